"""Low and high detail: the same image for fewer tokens, where the model's processor has a choice.

High is what the checkpoint's processor does. Low is one tile instead of many for Idefics3, and at most 512 x 512 pixels
for the Qwen families. A key covers the settings, so that what is computed for one is found for the other only where the
two make the same pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from engine.preprocess.image_input import Grid, ImageInput, ImageProcessor
from engine.preprocess.qwen2_vl import pixel_range
from engine.preprocess.settings import Settings
from engine.request import Detail
from engine.spec import ModelSpec, QwenVisionSpec, SiglipSpec

LOW_PIXELS = 512 * 512


class DetailedProcessor:
    """An ImageProcessor that also takes a detail."""

    def __init__(self, by_detail: Mapping[Detail, ImageProcessor]) -> None:
        self._by_detail = by_detail

    def process(self, image: Image.Image, data: bytes, detail: Detail = "high") -> ImageInput:
        return self._by_detail[detail].process(image, data)

    def count(self, width: int, height: int, detail: Detail = "high") -> tuple[int, Grid]:
        return self._by_detail[detail].count(width, height)

    def key(self, data: bytes, detail: Detail = "high") -> bytes:
        return self._by_detail[detail].key(data)


def low_detail(settings: Settings, spec: ModelSpec) -> Settings:
    """The settings that make low detail. Raises CheckpointError for settings that are malformed."""
    match spec.vision:
        case SiglipSpec():
            changes: dict[str, object] = {"do_image_splitting": False}
        case QwenVisionSpec():
            smallest, largest = pixel_range(settings)
            changes = {"min_pixels": smallest, "max_pixels": max(smallest, min(largest, LOW_PIXELS))}
        case _:
            changes = {}
    return Settings({**settings.values, **changes}, settings.file)
