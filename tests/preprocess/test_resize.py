"""Resizing equals, bit by bit, torch's of 8-bit images, which transformers' video processors use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as torchvision  # type: ignore[import-untyped]
from torchvision.transforms import InterpolationMode

from engine.preprocess.resize import resize_bicubic

RANDOM = np.random.default_rng(0)
SIZES = [(1, 1, 28, 56), (2, 300, 84, 28), (720, 1280, 392, 700), (480, 640, 480, 644), (97, 131, 97, 131)]
SIZES += [
    (int(height), int(width), 28 * int(rows), 28 * int(columns))
    for height, width, rows, columns in zip(
        *RANDOM.integers(1, 300, (2, 40)), *RANDOM.integers(1, 9, (2, 40)), strict=True
    )
]


@pytest.mark.parametrize(("height", "width", "rows", "columns"), SIZES)
def test_pixels_are_torchs(height: int, width: int, rows: int, columns: int) -> None:
    random = np.random.default_rng(height * 1000 + width)
    noise = random.integers(0, 256, (3, height, width), dtype=np.uint8)
    for planes in (noise, np.where(noise > 127, np.uint8(255), np.uint8(0))):  # the second overshoots everywhere
        wanted = torchvision.resize(
            torch.from_numpy(planes)[None], [rows, columns], interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        found = resize_bicubic(planes, rows, columns)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        assert np.array_equal(found, wanted[0].numpy())


def test_frames_may_lie_in_memory_in_any_order() -> None:
    frame = RANDOM.integers(0, 256, (61, 90, 3), dtype=np.uint8)
    planes = np.rot90(frame).transpose(2, 0, 1)
    assert np.array_equal(resize_bicubic(planes, 28, 56), resize_bicubic(np.ascontiguousarray(planes), 28, 56))
