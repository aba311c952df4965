"""Gemma 3's image processor: every image becomes one square of the tower's size, whatever its shape.

The arithmetic is that of transformers 5.17, models/gemma3/image_processing_pil_gemma3.py, without pan and scan, which
its processor leaves out unless a caller asks for it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from engine.errors import CheckpointError
from engine.preprocess.bands import resize
from engine.preprocess.image_input import Grid, ImageInput, image_key, settings_digest
from engine.preprocess.settings import Settings
from engine.spec import SiglipSpec

_SIZE = {"height": 224, "width": 224}
_UNSPLIT: Grid = (1, 0, 0)


class Gemma3Processor:
    """Raises CheckpointError for settings that do not fit the tower."""

    def __init__(self, settings: Settings, spec: SiglipSpec) -> None:
        if not settings.boolean("do_resize", True):
            raise settings.fail("do_resize", "true: the tower takes images of one size only")
        size = settings.section("size", _SIZE)
        sides = (size.integer("height", 0), size.integer("width", 0))
        if sides != (spec.tile, spec.tile):
            raise CheckpointError(
                f"{settings.file}: size is {sides[0]} x {sides[1]} pixels, but config.json's vision tower takes"
                f" {spec.tile} x {spec.tile}; make the two agree"
            )
        self._side = spec.tile
        self._tokens = spec.tokens_per_tile
        self._resample = Image.Resampling(settings.resample(Image.Resampling.BILINEAR))
        self._digest = settings_digest("gemma3", {"side": self._side, "resample": self._resample})

    def key(self, data: bytes) -> bytes:
        return image_key(self._digest, data)

    def count(self, width: int, height: int) -> tuple[int, Grid]:  # noqa: ARG002 - all sizes become one
        return self._tokens, _UNSPLIT

    def process(self, image: Image.Image, data: bytes) -> ImageInput:
        size = (self._side, self._side)
        if image.size != size:  # Pillow would make a copy
            image = resize(image, size, self._resample)
        pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))[None]
        return ImageInput(pixels, _UNSPLIT, self._tokens, self.key(data))
