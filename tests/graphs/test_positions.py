"""Positions that the towers' graphs compute on the host are the references'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2VLConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_position_ids

from engine.families import CheckpointConfig, family_for
from engine.runtime.vision_layout import vision_rotary
from engine.spec import QwenVisionSpec


def test_patches_take_learned_positions_in_order_as_in_the_reference() -> None:
    for side in (6, 7, 8, 14, 16, 24, 26, 27, 32, 64):
        config = Idefics3VisionConfig(hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1)
        embeddings: Any = Idefics3VisionEmbeddings(config)
        with torch.no_grad():
            embeddings.patch_embedding.weight.zero_()
            embeddings.patch_embedding.bias.zero_()
            embeddings.position_embedding.weight.copy_(torch.arange(side * side)[:, None])
            mask = torch.ones(1, side, side, dtype=torch.bool)
            taken = embeddings(torch.zeros(1, 3, side, side), mask).flatten().numpy()
        assert np.array_equal(taken, np.arange(side * side)), side


@pytest.mark.parametrize(("height", "width"), [(2, 2), (4, 10), (16, 6)])
def test_the_towers_rotary_embedding_is_the_references(height: int, width: int) -> None:
    config: Any = Qwen2VLConfig()
    spec = family_for({"model_type": "qwen2_vl"}).spec(CheckpointConfig({"model_type": "qwen2_vl"}, {}, {})).vision
    assert isinstance(spec, QwenVisionSpec)
    places = get_vision_position_ids(torch.tensor([[1, height, width]]), spec.merge)
    rotary = Qwen2VLVisionRotaryEmbedding(config.vision_config)
    cosine, sine = rotary(torch.zeros(1), places)
    half = cosine.shape[-1] // 2
    found = vision_rotary(spec, height, width)
    np.testing.assert_allclose(found[0], cosine[:, :half].numpy(), atol=1e-6)
    np.testing.assert_allclose(found[1], sine[:, :half].numpy(), atol=1e-6)
