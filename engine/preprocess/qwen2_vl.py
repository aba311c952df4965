"""Qwen2-VL's image processor: any resolution, sides of whole patches.

The arithmetic is that of transformers 5.17, models/qwen2_vl/image_processing_pil_qwen2_vl.py.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from engine.errors import CheckpointError, InvalidImage
from engine.preprocess.bands import resize
from engine.preprocess.image_input import Grid, ImageInput, image_key, settings_digest
from engine.preprocess.settings import Settings
from engine.spec import QwenVisionSpec

_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
_MAX_RATIO = 200


class Qwen2VLProcessor:
    """Raises CheckpointError for settings that do not fit the tower."""

    def __init__(self, settings: Settings, spec: QwenVisionSpec) -> None:
        self._patch, self._merge, self._temporal = spec.patch, spec.merge, spec.temporal_patch
        require_equal(settings, "patch_size", 14, spec.patch)
        require_equal(settings, "merge_size", 2, spec.merge)
        require_equal(settings, "temporal_patch_size", 2, spec.temporal_patch)
        if not settings.boolean("do_resize", True):
            raise settings.fail("do_resize", "true: the tower takes whole patches only")
        self._resample = Image.Resampling(settings.resample(Image.Resampling.BICUBIC))
        self._min_pixels, self._max_pixels = pixel_range(settings)
        self._digest = settings_digest("qwen2_vl", {
            "patch": self._patch, "merge": self._merge, "temporal": self._temporal, "resample": self._resample,
            "min_pixels": self._min_pixels, "max_pixels": self._max_pixels,
        })  # fmt: skip

    def key(self, data: bytes) -> bytes:
        return image_key(self._digest, data)

    def count(self, width: int, height: int) -> tuple[int, Grid]:
        width, height = self._resized(width, height)
        grid = (1, height // self._patch, width // self._patch)
        return grid[1] * grid[2] // self._merge**2, grid

    def process(self, image: Image.Image, data: bytes) -> ImageInput:
        tokens, grid = self.count(*image.size)
        image = resize(image, self._resized(*image.size), self._resample)
        pixels = np.stack([np.asarray(band) for band in image.split()])
        return ImageInput(pixels, grid, tokens, self.key(data))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Both sides multiples of patch * merge, the area within the limits, the shape kept as far as that goes."""
        if max(width, height) > _MAX_RATIO * min(width, height):
            raise InvalidImage(
                f"the image is {width}x{height} pixels; this model takes images up to {_MAX_RATIO} times as long as"
                " wide: crop it"
            )
        factor = self._patch * self._merge
        columns, rows = round(width / factor), round(height / factor)
        if rows * columns * factor**2 > self._max_pixels:
            scale = math.sqrt((height * width) / self._max_pixels)
            columns = max(1, math.floor(width / scale / factor))
            rows = max(1, math.floor(height / scale / factor))
        elif rows * columns * factor**2 < self._min_pixels:
            scale = math.sqrt(self._min_pixels / (height * width))
            columns, rows = math.ceil(width * scale / factor), math.ceil(height * scale / factor)
        return columns * factor, rows * factor


def require_equal(settings: Settings, name: str, default: int, expected: int) -> None:
    value = settings.integer(name, default)
    if value != expected:
        raise CheckpointError(
            f"{settings.file}: {name} is {value}, but config.json's vision tower has {expected}; make the two agree"
        )


def pixel_range(settings: Settings) -> tuple[int, int]:
    """min_pixels and max_pixels win over `size`, which spells them shortest_edge and longest_edge."""
    size = settings.section("size", _SIZE)
    smallest = settings.integer("min_pixels", size.integer("shortest_edge", size.integer("min_pixels", 0)))
    largest = settings.integer("max_pixels", size.integer("longest_edge", size.integer("max_pixels", 0)))
    if not 0 < smallest <= largest:
        raise settings.fail(
            "size", "an object with shortest_edge and longest_edge, the smallest and largest pixel count"
        )
    return smallest, largest
