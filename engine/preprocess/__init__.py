"""Bytes to uint8 pixels. Everything here is thread-safe and meant for worker threads."""

from __future__ import annotations

from pathlib import Path

from engine.preprocess.decode import decode_image, image_size
from engine.preprocess.detail import DetailedProcessor, low_detail
from engine.preprocess.gemma3 import Gemma3Processor
from engine.preprocess.image_input import (
    Grid,
    ImageInput,
    ImageProcessor,
    IsWanted,
    Timing,
    always_wanted,
    require_wanted,
)
from engine.preprocess.qwen2_vl import Qwen2VLProcessor
from engine.preprocess.qwen_video import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor, QwenVideoProcessor
from engine.preprocess.settings import Settings, read_settings, read_video_settings
from engine.preprocess.smolvlm import SmolVLMProcessor
from engine.spec import ModelSpec, QwenVisionSpec, SiglipSpec

__all__ = [
    "DetailedProcessor",
    "Grid",
    "ImageInput",
    "ImageProcessor",
    "IsWanted",
    "QwenVideoProcessor",
    "Settings",
    "Timing",
    "always_wanted",
    "decode_image",
    "image_processor",
    "image_size",
    "read_settings",
    "require_wanted",
    "video_processor",
]


def image_processor(folder: Path, spec: ModelSpec) -> DetailedProcessor:
    """The image processor of a checkpoint that has a vision tower.

    Raises CheckpointError, naming the file, when the settings are missing, malformed or do not fit the tower.
    """
    settings = read_settings(folder)
    return DetailedProcessor({"high": _of(settings, spec), "low": _of(low_detail(settings, spec), spec)})


def video_processor(folder: Path, spec: ModelSpec, *, max_tokens: int) -> QwenVideoProcessor | None:
    """The video processor of a checkpoint; None where its family reads no videos. `max_tokens` bounds one video.

    Raises CheckpointError as `image_processor` does.
    """
    if spec.tokens.video is None or not isinstance(spec.vision, QwenVisionSpec):
        return None
    kind = Qwen3VLVideoProcessor if spec.vision.timestamps else Qwen2VLVideoProcessor
    return kind(read_video_settings(folder), spec.vision, max_tokens=max_tokens)


def _of(settings: Settings, spec: ModelSpec) -> ImageProcessor:
    assert spec.vision is not None, "This is a bug: a text-only model has no image processor."
    if isinstance(spec.vision, SiglipSpec):
        if spec.vision.connector == "mean":
            return Gemma3Processor(settings, spec.vision)
        return SmolVLMProcessor(settings, spec.vision)
    return Qwen2VLProcessor(settings, spec.vision)
