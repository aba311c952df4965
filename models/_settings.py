"""The provider's form as the engine's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config import EngineConfig


def engine_config(credentials: Mapping[str, Any]) -> EngineConfig:
    """What the user entered, validated. Raises InvalidConfig naming the setting.

    Dify adds names of its own that start with two underscores (`__model_type`); they are no settings.
    """
    return EngineConfig.from_mapping({name: value for name, value in credentials.items() if not name.startswith("__")})
