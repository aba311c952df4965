"""One model, ready to run: everything that is loaded once and shared by all its requests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine import device
from engine.catalog import find_checkpoint
from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.preprocess import ImageInput, ImageProcessor, decode_image, image_processor, image_size
from engine.prompts import PromptBuilder
from engine.request import Image
from engine.runtime import Decoder, Encoder
from engine.scheduling.kv_cache import BLOCK, KVCache
from engine.scheduling.scheduler import Scheduler
from engine.spec import Precision

SMALL_MODEL_BYTES = 64 * 2**20
_NO_PIXELS = np.empty((0,), np.uint8)


@dataclass(eq=False, frozen=True, slots=True)
class Model:
    """`context_length` is what prompt and output may have together, in tokens."""

    name: str
    folder: Path
    artifact: Artifact
    prompts: PromptBuilder
    images: ImageProcessor | None
    decoder: Decoder
    encoder: Encoder | None
    scheduler: Scheduler
    context_length: int

    def layouts(self, images: Sequence[Image], max_megapixels: float) -> list[ImageInput]:
        """What the images will be to the prompt: tokens, grid and key, from the headers alone; no pixels yet.

        Raises InvalidImage, for one over the limit too: whether it is refused must not depend on what is cached.
        """
        return [self._layout(image.data, max_megapixels) for image in images]

    def image_input(self, data: bytes, max_megapixels: float) -> ImageInput:
        """Decode an image file for the tower. Raises InvalidImage."""
        return self._processor.process(decode_image(data, max_megapixels=max_megapixels), data)

    def _layout(self, data: bytes, max_megapixels: float) -> ImageInput:
        tokens, grid = self._processor.count(*image_size(data, max_megapixels=max_megapixels))
        return ImageInput(_NO_PIXELS, grid, tokens, self._processor.key(data))

    @property
    def _processor(self) -> ImageProcessor:
        if self.images is None:
            raise InvalidRequest(f"{self.name} reads text only; choose a model with vision, or leave the image out")
        return self.images


def resolve_precision(config: EngineConfig) -> Precision:
    """Raises DeviceUnavailable when CUDA is asked for and cannot be had, InvalidConfig for a precision of GPUs only."""
    if config.device.startswith("cuda"):
        device.resolve(config)
    return device.resolve_precision(config, device.Devices(), "float32")


def _threads(artifact: Artifact) -> int:
    """One core for a small model: its operators are over before a second thread has woken up to help."""
    return 1 if artifact.weight_bytes < SMALL_MODEL_BYTES else len(os.sched_getaffinity(0))


def load_model(name: str, config: EngineConfig) -> Model:
    """Convert if need be, open and warm up. Raises ModelUnavailable's children or StorageError; takes seconds."""
    checkpoint = Checkpoint.open(find_checkpoint(name, config.storage))
    artifact = open_artifact(checkpoint, resolve_precision(config), config.storage)
    spec = artifact.spec
    blocks = config.kv_cache_mib * 2**20 // (spec.decoder.kv_bytes_per_token * BLOCK)
    context_length = min(spec.decoder.context_length, blocks * BLOCK)
    threads = config.threads or _threads(artifact)
    decoder = Decoder(artifact, rows=config.max_batch_size, context_length=context_length, threads=threads)
    return Model(
        name=name,
        folder=checkpoint.folder,
        artifact=artifact,
        prompts=PromptBuilder(checkpoint.folder, spec),
        images=image_processor(checkpoint.folder, spec) if spec.vision else None,
        decoder=decoder,
        encoder=Encoder(artifact, threads=threads) if spec.vision else None,
        scheduler=Scheduler(KVCache(decoder, blocks), prefill_chunk=config.prefill_chunk),
        context_length=context_length,
    )
