"""Tiny models whose towers are of sizes that our kernels read: rows of weights at multiples of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedModel

from engine.checkpoints import Checkpoint
from tests.runtime import models
from tests.runtime.conftest import SHAPES, Tiny

_HEADS = {"hidden_size": 96, "num_heads": 3}
TOWERS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "smolvlm": (models.smolvlm, {}),  # 48 wide, 80 in the MLP
    "gemma3": (models.gemma3, {}),
    "qwen2_vl": (models.qwen2_vl, {"embed_dim": 96, "num_heads": 3}),
    "qwen2_5_vl": (models.qwen2_5_vl, _HEADS | {"intermediate_size": 80}),
    "qwen2_5_vl-60": (models.qwen2_5_vl, _HEADS),  # what follows the gate does not fit, as in released ones
    "qwen3_vl": (models.qwen3_vl, _HEADS),
    "qwen3_5": (models.qwen3_5, _HEADS),
}


def wide_model(name: str) -> PreTrainedModel:
    make, changes = TOWERS[name]
    model = make()
    for field, value in changes.items():
        setattr(model.config.vision_config, field, value)
    return type(model)(model.config)


def make_wide(name: str, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    model = models.randomise(wide_model(name))
    folder = models.save(model, tmp_path_factory.mktemp(name))
    return Tiny(model, Checkpoint.open(folder), tmp_path_factory.mktemp("storage"), SHAPES[name.split("-")[0]])
