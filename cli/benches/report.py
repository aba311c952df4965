"""What a measurement found: a card, rows, and how they print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cli.memory import memory_line
from engine.errors import EngineError

Row = dict[str, Any]


class BenchError(Exception):
    """A row cannot be measured; the message says why."""


@dataclass(frozen=True, slots=True)
class Report:
    """`card` is what the rows share: sizes, memory, the device's own rates. A row with "error" was not measured."""

    rows: list[Row]
    card: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return bool(self.rows) and all("error" not in row and not row.get("failed") for row in self.rows)


def attempt(name: str, measure: Callable[[], Row]) -> Row:
    """The row, or why there is none: one that cannot be measured does not take the others along."""
    try:
        return {"row": name, **measure()}
    except (BenchError, EngineError) as error:
        return {"row": name, "error": f"{type(error).__name__}: {error}"}


def print_card(values: Mapping[str, Any]) -> None:
    """On stderr; what models occupy in a line each."""
    facts = {name: value for name, value in values.items() if name != "memory"}
    print("  ".join(f"{name}: {value}" for name, value in facts.items()), file=sys.stderr)
    for entry in values.get("memory", ()):
        line = f"unknown: {entry['problem']}" if "problem" in entry else memory_line(entry)
        print(": ".join(filter(None, ("memory", entry.get("row"), line))), file=sys.stderr)


def print_table(rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> None:
    """`columns` are (heading, path) pairs; a path is a key, or key.key. Those that no row has are left out."""
    columns = [column for column in columns if any(_figure(row, column[1]) != "-" for row in rows)]
    head = max(24, *(len(row["row"]) + 2 for row in rows)) if rows else 24
    widths = [max(11, len(heading) + 2) for heading, _ in columns]
    print(f"{'':<{head}}" + "".join(f"{heading:>{width}}" for (heading, _), width in zip(columns, widths, strict=True)))
    for row in rows:
        if problem := row.get("error") or row.get("skipped"):
            print(f"{row['row']:<{head}}{problem}", file=sys.stderr)
            continue
        figures = (_figure(row, path) for _, path in columns)
        print(
            f"{row['row']:<{head}}" + "".join(f"{text:>{width}}" for text, width in zip(figures, widths, strict=True))
        )


def _figure(row: Row, path: str) -> str:
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return "-" if value is None else str(value)
