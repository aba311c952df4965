"""Ranges of keys and values for an int8 KV cache: measured once on ordinary text, and a picture if the model sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Picture

from engine.checkpoints import Artifact
from engine.checkpoints.kv_ranges import read_kv_ranges, write_kv_ranges
from engine.graphs.cuda import CudaGraph, cuda_decoder
from engine.graphs.cuda.fused import STOCK, Fusion
from engine.preprocess import ImageInput, image_processor
from engine.prompts import PromptBuilder
from engine.request import Image, Message, Text
from engine.runners.cuda import VisionTower
from engine.runtime.cuda.cache_scales import measure_ranges
from engine.runtime.cuda.decoder import PagedDecoder
from engine.runtime.cuda.session import GraphSession
from engine.runtime.cuda.step import PackedStep
from engine.runtime.cuda.weights import torch_type
from engine.spec import DecoderSpec, FloatType, ModelSpec

_TEXT_TOKENS = 512
_BLOCK = 256  # tokens; any size does
_SIDE = 448  # pixels
_TEXT = """\
The harbour of Trondheim froze on 14 January 1862, and for six weeks nothing could be unloaded. Merchants wrote letters:
"We hold 3,200 barrels of herring; what shall we do?" One of them, Ms Larsen, kept a diary in which she noted the
temperature every morning (-21 C, -18.5 C, -24 C) and the price of bread in the afternoon.

1. Wash the rice until the water runs clear, then let it rest for 20 minutes.
2. Fry the onions slowly; they should become golden, never brown.
3. Add salt, cumin and 350 ml of stock, cover the pot, and wait.

def area(points):
    total = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        total += x0 * y1 - x1 * y0
    return abs(total) / 2

In a triangle with sides 3, 4 and 5 the largest angle is 90 degrees, because 9 + 16 = 25. What happens to the area when
each side becomes twice as long? It grows by a factor of four: from 6 to 24.

Der Zug nach Basel faehrt um 7.45 Uhr von Gleis 9 ab. Le train pour Lyon a quinze minutes de retard. El museo cierra los
lunes. 今天的天气很好。我们去公园散步吧。 東京駅で乗り換えてください。 Сегодня в городе тихо.

| city | people | since |
| Bergen | 291,940 | 1070 |
| Oslo | 717,710 | 1040 |

{"name": "sensor-7", "values": [0.25, 1.5, null, -3e-4], "ok": true, "url": "https://example.org/a?b=c#d"}

She asked whether the committee had read the report. Nobody answered; the clock above the door showed ten past four, and
outside a delivery van reversed, beeping, into the yard. "Then I will read it to you," she said, "all of it."
"""


def kv_ranges(
    folder: Path,
    artifact: Artifact,
    activations: FloatType,
    open_session: Callable[[CudaGraph], GraphSession],
    tower: VisionTower | None,
    device: torch.device,
    fusion: Fusion = STOCK,
) -> NDArray[np.float32]:
    """[layers, 2, kv_heads, head_dim] as kept beside the artifact, or else measured and kept there.

    `folder` is the checkpoint's, `open_session` opens a 16-bit graph over weights that are on the device already.
    `fusion` is that of the other graphs, which decides how int8 weights lie there. Raises torch.OutOfMemoryError.
    """
    ranges = read_kv_ranges(artifact)
    if ranges is None:
        step = calibration_step(folder, artifact.spec, tower)
        ranges = _measured(artifact, activations, open_session, step, device, fusion)
        write_kv_ranges(artifact, ranges)
    return ranges


def _measured(
    artifact: Artifact,
    activations: FloatType,
    open_session: Callable[[CudaGraph], GraphSession],
    step: PackedStep,
    device: torch.device,
    fusion: Fusion,
) -> NDArray[np.float32]:
    session = open_session(cuda_decoder(artifact, activations, len(step.ids), fusion=fusion))
    decoder = calibration_decoder(session, artifact.spec.decoder, step, torch_type(activations), device)
    try:
        return measure_ranges(decoder, step)
    finally:
        decoder.close()


def calibration_decoder(
    session: GraphSession, spec: DecoderSpec, step: PackedStep, dtype: torch.dtype, device: torch.device
) -> PagedDecoder:
    """With memory for the one sequence of `step`, a `calibration_step`, and the logits that it asks for."""
    count, slots = len(step.ids), len(step.slots)
    return PagedDecoder(
        *(session, spec, torch.zeros(slots + 1, dtype=torch.int32, device=device)),
        dtype=dtype,
        blocks=step.tables.shape[1] + 1,
        block_size=_BLOCK,
        slots=slots,
        context_length=count,
        step_tokens=count,
    )


def calibration_tokens(folder: Path, spec: ModelSpec) -> int:
    """The most that a step made of the fixed text and picture has."""
    pictures = [calibration_image(folder, spec)] if spec.vision else []
    return _TEXT_TOKENS + sum(picture.tokens for picture in pictures)


def calibration_image(folder: Path, spec: ModelSpec) -> ImageInput:
    """The fixed picture as a checkpoint's tower sees it."""
    return image_processor(folder, spec).process(_picture(), b"calibration")


def calibration_step(folder: Path, spec: ModelSpec, tower: VisionTower | None) -> PackedStep:
    """One sequence of a checkpoint's own prompt format, in blocks 1, 2, ..., cut off where its context ends."""
    images = [calibration_image(folder, spec)] if tower is not None else []
    shown = tuple(Image(b"calibration") for _ in images)
    prompt = PromptBuilder(folder, spec).build((Message("user", (*shown, Text(_TEXT))),), images)
    room = _TEXT_TOKENS + prompt.image_tokens
    count = min(len(prompt.token_ids), room, spec.decoder.context_length)
    zero = np.zeros(1, np.int32)
    return PackedStep(
        ids=prompt.token_ids[:count].astype(np.int32),
        positions=prompt.positions[:, :count].astype(np.int32),
        counts=zero + count,
        past=zero,
        tables=np.arange(1, 1 - (-count // _BLOCK), dtype=np.int32)[None],
        logits_rows=zero + count - 1,
        slots=zero,
        features=torch.cat(tower.encode(images)) if tower is not None else None,
        feature_index=prompt.feature_index[:count].astype(np.int32) if tower is not None else None,
    )


def _picture() -> Picture.Image:
    """Colours that run into each other, stripes, and noise."""
    down, across = np.mgrid[0:_SIDE, 0:_SIDE]
    noise = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE // 4, 3))
    pixels = np.stack([down * 255 // _SIDE, across * 255 // _SIDE, 255 * ((down // 8 + across // 32) % 2)], -1)
    pixels[:, -noise.shape[1] :] = noise
    return Picture.fromarray(pixels.astype(np.uint8))
