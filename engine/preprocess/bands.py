"""Pillow's resizing on several cores: whoever waits for the first token waits for it."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

from PIL import Image, ImageChops

_MOST_BANDS = 4
_CORES_FOR_EACH = 4  # of the machine's: the others have models to run
_LEAST_PIXELS = 1 << 16  # of a band; a smaller one is resized before another thread is awake

Size = tuple[int, int]
Box = tuple[int, int, int, int]


def resize(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    """What `image.resize` gives, to the bit.

    Pillow resizes in one direction, rounds to 8 bits, then in the other (src/libImaging/Resample.c): lines do not know
    of each other, so that they can be cut into bands.
    """
    bands = min(_bands(), image.width * image.height // _LEAST_PIXELS)
    both = image.width != size[0] and image.height != size[1]
    rows_first = _rows_first(resample, size[0] > image.width, size[1] > image.height)
    if bands < 2 or image.mode != "RGB" or (both and rows_first is None):
        return image.resize(size, resample)
    first = (size[0], image.height) if rows_first else (image.width, size[1])
    return _resized(_resized(image, first, resample, bands), size, resample, bands)


def _resized(image: Image.Image, size: Size, resample: Image.Resampling, bands: int) -> Image.Image:
    """In one direction at most."""
    if image.size == size:
        return image
    across = image.width != size[0]
    length = image.height if across else image.width
    places = [length * band // bands for band in range(bands + 1)]
    boxes: list[Box] = [
        (0, start, image.width, stop) if across else (start, 0, stop, image.height)
        for start, stop in itertools.pairwise(places)
    ]
    result = Image.new(image.mode, size)
    for box, band in zip(boxes, _pool().map(partial(_band, image, size, resample), boxes), strict=True):
        result.paste(band, box[:2])
    return result


def _band(image: Image.Image, size: Size, resample: Image.Resampling, box: Box) -> Image.Image:
    band = image.crop(box)
    return band.resize((size[0], band.height) if image.width != size[0] else (band.width, size[1]), resample)


@cache
def _rows_first(resample: Image.Resampling, wider: bool, higher: bool) -> bool | None:
    """The order of the two directions, which Pillow changed once; None if it is neither."""
    image = Image.frombytes("L", (32, 32), bytes(place * place * 37 % 251 for place in range(32 * 32)))
    width, height = 40 if wider else 24, 40 if higher else 24
    wanted = image.resize((width, height), resample)
    for rows_first, size in ((True, (width, 32)), (False, (32, height))):
        found = image.resize(size, resample).resize((width, height), resample)
        if ImageChops.difference(found, wanted).getbbox() is None:
            return rows_first
    return None


@cache
def _bands() -> int:
    return min(_MOST_BANDS, (os.cpu_count() or 1) // _CORES_FOR_EACH)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST_BANDS, "resize")
