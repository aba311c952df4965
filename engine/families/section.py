"""Typed reading of a configuration file, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError


class Section:
    """A mapping of config.json; `path` is where it stands in the file ("text_config.")."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def fail(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"config.json: {self._path}{name} is {self._values.get(name)!r}; it must be {wanted}")

    def section(self, name: str) -> Section:
        """A nested mapping; empty when absent, so that its fields take their defaults."""
        value = self._values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.fail(name, "an object")
        return Section(value, f"{self._path}{name}.")

    def integer(self, name: str, default: int) -> int:
        """A positive integer; a square given as [n, n] counts as n."""
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(name, "a positive integer")
        return value

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A growing list of integers from 0, which may be empty."""
        value = self._values.get(name)
        if value is None:
            return default
        valid = isinstance(value, list) and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value
        )
        if not valid or sorted(set(value)) != value:
            raise self.fail(name, "a list of growing numbers, 0 or more")
        return tuple(value)

    def number(self, name: str, default: float) -> float:
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.fail(name, "a positive number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self._values.get(name)
        if value is None:
            return default
        if value not in choices:
            raise self.fail(name, f"one of {', '.join(choices)}, which is what this engine runs")
        return str(value)

    def divided(self, name: str, value: int, by: int) -> int:
        """value / by, which must be whole; `name` is the field that a person would change."""
        if value % by:
            raise CheckpointError(f"config.json: {self._path}{name} is {value}, which {by} does not divide")
        return value // by
