"""Idefics3's and SmolVLM's image processor: square tiles and a small view of the whole image.

The arithmetic is that of transformers 5.17, models/idefics3/image_processing_pil_idefics3.py, on Pillow images
throughout.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import CheckpointError
from engine.preprocess.bands import resize
from engine.preprocess.image_input import Grid, ImageInput, image_key, settings_digest
from engine.preprocess.settings import Settings
from engine.spec import SiglipSpec

_MAX_SIDE = 4096  # pixels, whatever the settings say
_LONGEST_EDGE = {"longest_edge": 4 * 364}
_MAX_IMAGE_SIZE = {"longest_edge": 364}


class SmolVLMProcessor:
    """Raises CheckpointError for settings that do not fit the tower."""

    def __init__(self, settings: Settings, spec: SiglipSpec) -> None:
        self._tokens_per_tile = spec.tokens_per_tile
        self._tile = settings.section("max_image_size", _MAX_IMAGE_SIZE).integer("longest_edge", 0)
        if self._tile != spec.tile:
            raise CheckpointError(
                f"{settings.file}: max_image_size is {self._tile} pixels, but config.json's vision tower takes tiles"
                f" of {spec.tile}; make the two agree"
            )
        self._splits = settings.boolean("do_image_splitting", True)
        self._resample = Image.Resampling(settings.resample(Image.Resampling.LANCZOS))
        self._size = _first_size(settings)
        self._digest = settings_digest("smolvlm", {
            "tile": self._tile, "splits": self._splits, "resample": self._resample, "size": self._size,
        })  # fmt: skip

    def key(self, data: bytes) -> bytes:
        return image_key(self._digest, data)

    def count(self, width: int, height: int) -> tuple[int, Grid]:
        rows, columns = self._grid(*self._split_size(*self._first(width, height)))
        return (rows * columns + 1) * self._tokens_per_tile, (1, rows, columns)

    def process(self, image: Image.Image, data: bytes) -> ImageInput:
        image = self._resized(image, self._first(*image.size))
        image = self._resized(image, self._split_size(*image.size))
        rows, columns = self._grid(*image.size)
        pixels = np.empty((rows * columns + 1, 3, self._tile, self._tile), np.uint8)
        whole = self._resized(image, (self._tile, self._tile))
        pixels[-1] = np.asarray(whole).transpose(2, 0, 1)
        if rows:
            for channel, band in enumerate(image.split()):
                pixels[:-1, channel] = _tiles(np.asarray(band), rows, columns, self._tile)
        tokens = (rows * columns + 1) * self._tokens_per_tile
        return ImageInput(pixels, (1, rows, columns), tokens, self.key(data))

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return image if image.size == size else resize(image, size, self._resample)  # Pillow would make a copy

    def _first(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after the first resize."""
        if self._size is None:
            return width, height
        if isinstance(self._size, tuple):
            return self._size
        return _below(*_longest_edge(width, height, self._size), _MAX_SIDE)

    def _split_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) as multiples of a tile."""
        if not self._splits:
            return self._tile, self._tile
        ratio = width / height
        if width >= height:
            width = self._multiple(width)
            height = self._multiple(int(width / ratio))
        else:
            height = self._multiple(height)
            width = self._multiple(int(height * ratio))
        return width, height

    def _multiple(self, side: int) -> int:
        return max(1, math.ceil(side / self._tile)) * self._tile

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        rows, columns = height // self._tile, width // self._tile
        return (rows, columns) if rows * columns > 1 else (0, 0)


def _first_size(settings: Settings) -> int | tuple[int, int] | None:
    """The longest edge, or (width, height), or None for no resize."""
    if not settings.boolean("do_resize", True):
        return None
    size = settings.section("size", _LONGEST_EDGE)
    if longest := size.integer("longest_edge", 0):
        return longest
    height, width = size.integer("height", 0), size.integer("width", 0)
    if not height or not width:
        raise settings.fail("size", "an object with longest_edge, or with height and width")
    return width, height


def _longest_edge(width: int, height: int, longest: int) -> tuple[int, int]:
    """Scale so that the longer side is `longest` and the other one even."""
    ratio = width / height
    if width >= height:
        other = int(longest / ratio)
        return longest, max(other + other % 2, 1)
    other = int(longest * ratio)
    return max(other + other % 2, 1), longest


def _below(width: int, height: int, limit: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height and width > limit:
        width, height = limit, int(limit / ratio)
    elif height > width and height > limit:
        width, height = int(limit * ratio), limit
    return max(width, 1), max(height, 1)


def _tiles(channel: NDArray[np.uint8], rows: int, columns: int, tile: int) -> NDArray[np.uint8]:
    """[rows * tile, columns * tile] to [rows * columns, tile, tile]."""
    return channel.reshape(rows, tile, columns, tile).swapaxes(1, 2).reshape(-1, tile, tile)
