"""Runs the vision tower and its connector over the images of many requests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.artifact import Artifact
from engine.graphs.cpu import TowerInputs, cpu_tower
from engine.runtime.session import open_session, run
from engine.runtime.vision_layout import (
    Picture,
    cut_patches,
    padded_windows,
    position_taps,
    split_frames,
    vision_rotary,
)
from engine.spec import QwenVisionSpec, SiglipSpec

# Activations of one call stay below a few hundred MiB for towers of a thousand dimensions; one image may exceed it.
PATCHES_PER_CALL = 4096
# Beyond this, getting memory anew is cheap beside the call, and a rare large image should not be paid for for ever.
_KEEP_PATCHES = 2048


class TowerInput(Protocol):
    """What the tower needs of an `ImageInput`."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """SigLIP [tiles, 3, side, side], Qwen2-VL [3, height, width], a video [frames, 3, height, width]."""
        ...

    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def tokens(self) -> int: ...


class Encoder:
    """One ONNX Runtime session; any number of threads.

    An image's features do not depend, to the bit, on the images beside it.
    """

    def __init__(self, artifact: Artifact, *, threads: int) -> None:
        spec = artifact.spec.vision
        assert spec is not None, "a text-only model has no encoder"
        self._spec = spec
        self._session = open_session(cpu_tower(artifact), artifact, threads)

    def encode(self, images: Sequence[TowerInput]) -> list[NDArray[np.float32]]:
        """One [tokens, feature_width] per image; as few calls as PATCHES_PER_CALL allows.

        SigLIP takes the tiles of all images together; Qwen2-VL's images share a call when they have the same size
        (on a CPU, padding images of several sizes to one costs more than a call saves), as a video's frames do.
        """
        if isinstance(self._spec, SiglipSpec):
            return self._encode_tiles(self._spec, images)
        return self._encode_grids(self._spec, images)

    def _encode_tiles(self, spec: SiglipSpec, images: Sequence[TowerInput]) -> list[NDArray[np.float32]]:
        if not images:
            return []
        patches_per_tile = (spec.tile // spec.patch) ** 2
        per_call = max(1, PATCHES_PER_CALL // patches_per_tile)
        tiles = np.concatenate([image.pixels for image in images])
        batches = [tiles[start : start + per_call] for start in range(0, len(tiles), per_call)]
        calls = [self._run(len(batch) * patches_per_tile, {TowerInputs.PIXELS: batch}) for batch in batches]
        ends = np.cumsum([len(image.pixels) * spec.tokens_per_tile for image in images])
        return np.split(np.concatenate(calls), ends[:-1])

    def _encode_grids(self, spec: QwenVisionSpec, images: Sequence[TowerInput]) -> list[NDArray[np.float32]]:
        pictures = [split_frames(image.pixels, image.grid) for image in images]
        flat = [picture for parts in pictures for picture in parts]
        features: list[NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(flat)
        for members in _alike(flat):
            height, width = flat[members[0]].height, flat[members[0]].width
            cosine, sine = vision_rotary(spec, height, width)
            inputs: dict[str, NDArray[Any]] = {
                TowerInputs.PIXELS: np.concatenate([cut_patches(spec, flat[member].pixels) for member in members]),
                TowerInputs.SHAPE: np.array([len(members), height * width, -1]),
                TowerInputs.COSINE: cosine,
                TowerInputs.SINE: sine,
            }
            if spec.position_side:
                taps, weights = position_taps(spec, height, width)
                inputs[TowerInputs.TAPS] = np.tile(taps, (1, len(members)))
                inputs[TowerInputs.TAP_WEIGHTS] = np.tile(weights, (1, len(members), 1))
            if spec.window:
                names = (TowerInputs.WINDOWS, TowerInputs.WINDOW_MASK, TowerInputs.UNWINDOWED)
                inputs |= zip(names, padded_windows(spec, height, width, len(members)), strict=True)
            rows = self._run(height * width * len(members), inputs)
            for member, part in zip(members, np.split(rows, len(members)), strict=True):
                features[member] = part
        parts = iter(features)
        return [_joined(list(itertools.islice(parts, len(one)))) for one in pictures]

    def _run(self, patches: int, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        return run(self._session, inputs, TowerInputs.FEATURES, shrink=patches > _KEEP_PATCHES)


def _alike(pictures: Sequence[Picture]) -> Iterator[list[int]]:
    """Pictures of one size, all still or all of videos, cut into calls."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for number, picture in enumerate(pictures):
        groups.setdefault((picture.frames, picture.height, picture.width), []).append(number)
    for members in groups.values():
        per_call = max(1, PATCHES_PER_CALL // pictures[members[0]].patches)
        for start in range(0, len(members), per_call):
            yield members[start : start + per_call]


def _joined(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
