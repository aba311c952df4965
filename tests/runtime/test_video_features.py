"""Towers give the features of videos that transformers' give, and the same ones to the bit whatever is beside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.runtime import encoder as module
from engine.runtime.vision_layout import cut_patches, split_frames
from engine.spec import QwenVisionSpec
from tests.runtime.cases import Picture, films, normalised, pictures, relative_error
from tests.runtime.conftest import Tiny, make_tiny

# Two are of one size; windows divide none of them.
GRIDS = [(3, 6, 10), (1, 4, 6), (2, 6, 10), (4, 2, 12)]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory)


def reference_features(tiny: Tiny, videos: list[Picture]) -> NDArray[np.float32]:
    spec = tiny.spec.vision
    assert isinstance(spec, QwenVisionSpec)
    cut = [cut_patches(spec, one.pixels) for video in videos for one in split_frames(video.pixels, video.grid)]
    patches = np.concatenate(cut).reshape(-1, 3, spec.temporal_patch * spec.patch**2)
    model: Any = tiny.reference
    with torch.no_grad():
        result = model.model.get_video_features(
            torch.tensor(normalised(patches, spec.norm)), torch.tensor([video.grid for video in videos])
        )
    parts = [torch.cat(list(result.pooler_output)), *(getattr(result, "deepstack_features", None) or [])]
    features: NDArray[np.float32] = torch.cat(parts, dim=1).numpy()
    return features


def test_features_are_transformers(tiny: Tiny) -> None:
    videos = films(tiny.spec, GRIDS, seed=1)
    found = tiny.encoder("fp32").encode(videos)
    assert [len(part) for part in found] == [video.tokens for video in videos]
    assert relative_error(np.concatenate(found), reference_features(tiny, videos)) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_features_are_the_same_to_the_bit_alone_among_others_and_in_pieces(
    precision: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, images = films(tiny.spec, GRIDS, seed=2), pictures(tiny.spec, [(6, 10), (4, 6)], seed=3)
    encoder = tiny.encoder(precision)
    alone = [encoder.encode([one])[0] for one in (*videos, *images)]
    assert all(map(np.array_equal, encoder.encode([*videos, *images]), alone))
    monkeypatch.setattr(module, "PATCHES_PER_CALL", 130)
    assert all(map(np.array_equal, encoder.encode([*images, *videos]), [*alone[4:], *alone[:4]]))


def test_a_still_image_is_a_video_that_stands_still(tiny: Tiny) -> None:
    (image,) = pictures(tiny.spec, [(6, 10)], seed=4)
    video = Picture(np.stack([image.pixels] * 2), image.grid, image.tokens)
    still, moving = tiny.encoder("fp32").encode([image, video])
    assert np.array_equal(still, moving)
