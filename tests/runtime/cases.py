"""One sequence with images, and what transformers makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from engine.runtime import Decoder
from engine.runtime.vision_layout import cut_patches
from engine.spec import DecoderSpec, ModelSpec, PixelNorm, QwenVisionSpec, SiglipSpec
from tests.runtime.models import IMAGE_TOKEN

VISION_START, VISION_END = 95, 96


@dataclass(frozen=True)
class Picture:
    """Random pixels in the place of an `ImageInput`."""

    pixels: NDArray[np.uint8] = field(repr=False)
    grid: tuple[int, int, int]
    tokens: int


@dataclass(frozen=True)
class Case:
    """Token ids [T], positions [axes, T], rows of features [T]; logits [T, vocab] are the reference's."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    feature_index: NDArray[np.int64]
    pictures: list[Picture]
    features: NDArray[np.float32]
    logits: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.token_ids)


def pictures(spec: ModelSpec, shapes: Sequence[tuple[int, int]], seed: int) -> list[Picture]:
    """One per shape: SigLIP takes (rows, columns) of split tiles, Qwen2-VL (height, width) in patches."""
    random = np.random.default_rng(seed)
    made = []
    for height, width in shapes:
        if isinstance(spec.vision, SiglipSpec):
            tiles = height * width + 1 if height else 1
            size: tuple[int, ...] = (tiles, 3, spec.vision.tile, spec.vision.tile)
            grid, tokens = (1, height, width), tiles * spec.vision.tokens_per_tile
        else:
            assert isinstance(spec.vision, QwenVisionSpec)
            size = (3, height * spec.vision.patch, width * spec.vision.patch)
            grid, tokens = (1, height, width), height * width // spec.vision.merge**2
        made.append(Picture(random.integers(0, 256, size, dtype=np.uint8), grid, tokens))
    return made


def films(spec: ModelSpec, grids: Sequence[tuple[int, int, int]], seed: int) -> list[Picture]:
    """One video per grid, (temporal patches, height and width in patches), all frames different."""
    random = np.random.default_rng(seed)
    assert isinstance(spec.vision, QwenVisionSpec)
    made = []
    for times, height, width in grids:
        side = spec.vision.patch
        size = (times * spec.vision.temporal_patch, 3, height * side, width * side)
        tokens = times * height * width // spec.vision.merge**2
        made.append(Picture(random.integers(0, 256, size, dtype=np.uint8), (times, height, width), tokens))
    return made


def make_case(model: PreTrainedModel, spec: ModelSpec, images: list[Picture], length: int, seed: int) -> Case:
    """Random text around the images, `length` tokens in all."""
    random = np.random.default_rng(seed)
    token_ids = random.integers(3, VISION_START, length)
    at = 3
    for image in images:
        token_ids[at] = VISION_START
        token_ids[at + 1 : at + 1 + image.tokens] = IMAGE_TOKEN
        token_ids[at + 1 + image.tokens] = VISION_END
        at += image.tokens + 4
    assert at < length, "the images do not fit"
    index = np.full(length, -1)
    is_image = token_ids == IMAGE_TOKEN
    index[is_image] = np.arange(is_image.sum())
    inputs = _reference_inputs(model, spec, images, token_ids)
    positions, features = np.arange(length)[None], np.zeros((0, spec.decoder.feature_width), np.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(token_ids)[None], **inputs).logits[0].numpy()
        if images:
            features = _reference_features(model, inputs)
        if spec.decoder.rope.axes == 3 and _has_tower(model):
            text = {name: value for name, value in inputs.items() if name != "pixel_values"}
            positions = model.model.get_rope_index(torch.tensor(token_ids)[None], **text)[0][:, 0].numpy()
        elif spec.decoder.rope.axes == 3:
            positions = np.tile(positions, (3, 1))
    return Case(token_ids, positions, index, images, features, logits)


def logits_at(model: PreTrainedModel, token_ids: NDArray[Any], positions: NDArray[Any]) -> NDArray[np.float32]:
    """The reference's, of text at three positions each."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor(token_ids)[None], position_ids=torch.tensor(positions)[:, None])
    logits: NDArray[np.float32] = output.logits[0].numpy()
    return logits


def _has_tower(model: PreTrainedModel) -> bool:
    return hasattr(model.model, "get_rope_index")


def _reference_inputs(
    model: PreTrainedModel, spec: ModelSpec, images: list[Picture], token_ids: NDArray[np.int64]
) -> dict[str, Any]:
    three_axis = spec.decoder.rope.axes == 3
    types = torch.tensor((token_ids == IMAGE_TOKEN).astype(np.int64))[None]
    if not images:
        return {"mm_token_type_ids": types} if three_axis and _has_tower(model) else {}
    assert spec.vision is not None
    if isinstance(spec.vision, SiglipSpec):
        pixels = np.concatenate([image.pixels for image in images])
        values = torch.tensor(_normalise(pixels.swapaxes(1, 3), spec.vision.norm).swapaxes(1, 3))
        if spec.decoder.mutual_images:
            return {"pixel_values": values, "token_type_ids": types}
        return {"pixel_values": values[None]}
    channels = np.concatenate([still_patches(spec.vision, image.pixels) for image in images])
    patches = normalised(channels, spec.vision.norm)
    grid = torch.tensor([image.grid for image in images])
    return {"pixel_values": torch.tensor(patches), "image_grid_thw": grid, "mm_token_type_ids": types}


def normalised(patches: NDArray[np.uint8], norm: PixelNorm) -> NDArray[np.float32]:
    """[patches, 3, n] to [patches, 3 * n]."""
    return _normalise(patches.swapaxes(1, 2), norm).swapaxes(1, 2).reshape(len(patches), -1)


def still_patches(spec: QwenVisionSpec, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[patches, 3, temporal_patch * patch**2] as transformers cuts a still image."""
    return np.tile(cut_patches(spec, pixels[None])[:, :, 0], (1, 1, spec.temporal_patch))


def _normalise(pixels: NDArray[np.uint8], norm: PixelNorm) -> NDArray[np.float32]:
    """Channels last."""
    normalised: NDArray[Any] = (pixels * norm.rescale - np.array(norm.mean)) / np.array(norm.std)
    return normalised.astype(np.float32)


def _reference_features(model: PreTrainedModel, inputs: dict[str, Any]) -> NDArray[np.float32]:
    pixels = {name: value for name, value in inputs.items() if not name.endswith("token_type_ids")}
    result = model.model.get_image_features(**pixels)
    output = result.pooler_output
    output = torch.cat(list(output)) if isinstance(output, list | tuple) else output
    parts = [output.reshape(-1, output.shape[-1]), *(getattr(result, "deepstack_features", None) or [])]
    features: NDArray[np.float32] = torch.cat(parts, dim=1).numpy()
    return features


def prefill(
    decoder: Decoder, row: int, case: Case, start: int, stop: int, chunk: int = 1 << 30, features: Any = None
) -> NDArray[np.float32]:
    """Logits of all tokens in [start, stop), computed `chunk` at a time."""
    features = case.features if features is None else features
    parts = []
    for begin, end in pieces(decoder.spec, case, start, stop, chunk):
        part = slice(begin, end)
        inputs = (case.token_ids[part], case.positions[:, part], features, case.feature_index[part])
        parts.append(decoder.prefill(row, begin, *inputs, logits="all"))
    return np.concatenate(parts)


def pieces(spec: DecoderSpec, case: Case, start: int, stop: int, chunk: int = 1 << 30) -> Iterator[tuple[int, int]]:
    """[start, stop) in chunks; an image whose tokens attend to each other both ways is one, whatever its size."""
    is_image = case.feature_index >= 0
    turns = np.flatnonzero(np.diff(is_image)) + 1
    while start < stop:
        end = min(start + chunk, stop)
        if spec.mutual_images:
            turn = int(next((place for place in turns if place > start), stop))
            end = min(turn, stop if is_image[start] else end)
        yield start, end
        start = end


def decode(decoder: Decoder, steps: Sequence[tuple[int, Case, int]]) -> NDArray[np.float32]:
    """One step for (row, case, tokens the row holds) each."""
    logits = decoder.decode(
        [row for row, _, _ in steps],
        np.array([case.token_ids[length] for _, case, length in steps]),
        np.stack([case.positions[:, length] for _, case, length in steps], axis=1),
        np.array([length for _, _, length in steps]),
    )
    return logits.copy()  # the decoder's own would be the next call's


def decode_again(decoder: Decoder, steps: Sequence[tuple[int, Case, int]]) -> NDArray[np.float32]:
    """`decode`, after which the rows' states are as before, so that the same step can be asked for once more."""
    states = [(row, decoder.read_state(row)) for row, _, _ in steps]
    logits = decode(decoder, steps)
    for row, state in states:
        decoder.write_state(row, state)
    return logits


def relative_error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
