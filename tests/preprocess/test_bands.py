"""Resizing in bands against Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from engine.preprocess import bands

SIZES = [
    ((640, 480), (644, 476)),  # wider and lower
    ((640, 480), (616, 504)),
    ((1001, 777), (300, 200)),
    ((517, 733), (900, 1001)),
    ((640, 480), (644, 480)),
    ((640, 480), (640, 476)),
    ((640, 480), (640, 480)),
    ((90, 60), (84, 56)),  # too small for bands
]
RESAMPLINGS = [Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR, Image.Resampling.NEAREST]


def noise(size: tuple[int, int], mode: str) -> Image.Image:
    image = Image.frombytes("RGB", size, np.random.default_rng(0).bytes(3 * size[0] * size[1]))
    return image.convert(mode)


@pytest.mark.parametrize("resample", RESAMPLINGS)
@pytest.mark.parametrize(("size", "wanted"), SIZES)
def test_bands_are_what_pillow_makes_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], wanted: tuple[int, int], resample: Image.Resampling
) -> None:
    monkeypatch.setattr(bands, "_bands", lambda: 3)
    image = noise(size, "RGB")
    found = bands.resize(image, wanted, resample)
    assert np.array_equal(np.asarray(found), np.asarray(image.resize(wanted, resample)))


def test_pillow_resizes_in_one_of_two_orders() -> None:
    """If not, resizing is still right, and no faster."""
    orders = [bands._rows_first(Image.Resampling.BICUBIC, wider, higher) for wider in (0, 1) for higher in (0, 1)]
    assert None not in orders
