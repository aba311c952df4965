"""Bytes to uint8 pixels. Everything here is thread-safe and meant for worker threads."""

from __future__ import annotations

from pathlib import Path

from engine.preprocess.decode import decode_image, image_size
from engine.preprocess.image_input import Grid, ImageInput, ImageProcessor
from engine.preprocess.qwen2_vl import Qwen2VLProcessor
from engine.preprocess.settings import Settings, read_settings
from engine.preprocess.smolvlm import SmolVLMProcessor
from engine.spec import ModelSpec, SiglipSpec

__all__ = [
    "Grid",
    "ImageInput",
    "ImageProcessor",
    "Settings",
    "decode_image",
    "image_processor",
    "image_size",
    "read_settings",
]


def image_processor(folder: Path, spec: ModelSpec) -> ImageProcessor:
    """The image processor of a checkpoint that has a vision tower.

    Raises CheckpointError, naming the file, when the settings are missing, malformed or do not fit the tower.
    """
    assert spec.vision is not None, "This is a bug: a text-only model has no image processor."
    settings = read_settings(folder)
    if isinstance(spec.vision, SiglipSpec):
        return SmolVLMProcessor(settings, spec.vision)
    return Qwen2VLProcessor(settings, spec.vision)
