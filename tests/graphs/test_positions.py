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
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from engine.families import CheckpointConfig, family_for
from engine.runtime.vision_layout import padded_windows, position_taps, vision_rotary, window_layout
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


def tower(model_type: str, **vision: Any) -> QwenVisionSpec:
    config = {"model_type": model_type, "vision_config": vision}
    spec = family_for(config).spec(CheckpointConfig(config, {}, {})).vision
    assert isinstance(spec, QwenVisionSpec)
    return spec


GRIDS = [(2, 2), (4, 10), (16, 6), (62, 64), (48, 48), (2, 200)]


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_learned_positions_are_stretched_to_an_image_as_in_the_reference(height: int, width: int) -> None:
    spec = tower("qwen3_vl")
    taps, weights = position_taps(spec, height, width)
    wanted = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, height, width]]), spec.position_side, "bilinear", True, spec.merge
    )
    assert np.array_equal(taps, wanted[0].T.numpy())
    np.testing.assert_allclose(weights[..., 0], wanted[1].T.numpy(), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_windows_are_the_references(height: int, width: int) -> None:
    spec = tower("qwen2_5_vl")
    layout = window_layout(spec, height, width)
    wanted = get_vision_window_index(torch.tensor([[1, height, width]]), spec.merge, 112, spec.patch)
    assert layout.tokens.tolist() == wanted[0].tolist()
    assert [0, *np.cumsum(layout.sizes)] == wanted[1].tolist()
    assert (layout.order.reshape(-1, 4) == layout.tokens[:, None] * 4 + np.arange(4)).all()


def test_padded_windows_hold_every_patch_once_and_lead_back_to_it() -> None:
    spec = tower("qwen2_5_vl", window_size=56)
    windows, mask, places = padded_windows(spec, 6, 10, images=2)
    assert windows.shape == (12, 16)  # two rows of windows, three columns, two images
    assert mask.shape == (12, 1, 16, 16)
    assert windows.reshape(-1)[places].tolist() == list(range(120))
    assert mask[:, 0].sum() == 120 * 16
    assert mask[:, 0, 0].reshape(-1)[places].all()
