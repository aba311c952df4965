"""An image processor's settings, from either layout that transformers has written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

_NESTED = "processor_config.json"
_FLAT = "preprocessor_config.json"
_VIDEO = "video_preprocessor_config.json"


class Settings:
    """Typed access to one JSON object; `file` names it in errors."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.values = values
        self.file = file

    def fail(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {name} is {self.values.get(name)!r}; it must be {wanted}")

    def integer(self, name: str, default: int) -> int:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(name, "a positive integer")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fail(name, "a positive number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def section(self, name: str, default: Mapping[str, Any]) -> Settings:
        value = self.values.get(name)
        if value is None:
            value = default
        if not isinstance(value, Mapping):
            raise self.fail(name, "an object")
        return Settings(value, f"{self.file}: {name}")

    def resample(self, default: int) -> int:
        """Pillow's number of a resampling filter."""
        value = self.integer("resample", default) if self.values.get("resample") != 0 else 0
        if value > 5:
            raise self.fail("resample", "one of Pillow's filters, 0 to 5")
        return value


def read_settings(folder: Path) -> Settings:
    """The section `image_processor` of processor_config.json, else preprocessor_config.json (transformers' order).

    Raises CheckpointError when neither is there or one is malformed.
    """
    nested = _read_json(folder / _NESTED)
    if nested is not None and "image_processor" in nested:
        return Settings(nested, f"{folder.name}/{_NESTED}").section("image_processor", {})
    flat = _read_json(folder / _FLAT)
    if flat is None:
        raise CheckpointError(
            f"{folder} has neither {_FLAT} nor an image_processor in {_NESTED}; copy it from the model's home"
        )
    return Settings(flat, f"{folder.name}/{_FLAT}")


def read_video_settings(folder: Path) -> Settings:
    """The section `video_processor` of processor_config.json, else the first file of two (transformers' order).

    Checkpoints from before there were video processors have preprocessor_config.json alone, for images and videos.
    """
    nested = _read_json(folder / _NESTED)
    if nested is not None and "video_processor" in nested:
        return Settings(nested, f"{folder.name}/{_NESTED}").section("video_processor", {})
    for name in (_VIDEO, _FLAT):
        if (flat := _read_json(folder / name)) is not None:
            return Settings(flat, f"{folder.name}/{name}")
    return Settings({}, f"{folder.name}/{_VIDEO}")


def _read_json(path: Path) -> Mapping[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; it must hold a JSON object")
    return value
