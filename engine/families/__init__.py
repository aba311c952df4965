"""One file per architecture; `family_for` finds the one that reads a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.families import gemma3, llama, qwen2, qwen2_5_vl, qwen2_vl, qwen3, qwen3_5, qwen3_vl, smolvlm
from engine.families.family import CheckpointConfig, Family, Weight

__all__ = ["FAMILIES", "CheckpointConfig", "Family", "Weight", "family_for"]

FAMILIES: tuple[Family, ...] = (
    smolvlm.FAMILY,
    qwen2_vl.FAMILY,
    qwen2_5_vl.FAMILY,
    qwen3_vl.FAMILY,
    qwen3_5.FAMILY,
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_5.TEXT_FAMILY,
    gemma3.FAMILY,
    gemma3.TEXT_FAMILY,
)


def family_for(config: Mapping[str, Any]) -> Family:
    """The family that reads a `config.json`. Raises CheckpointError, naming what is supported."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise CheckpointError(f"config.json has model_type {model_type!r}; this engine runs {known}")
