"""Runs the vision tower and its connector over the images of many requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.artifact import Artifact
from engine.graphs.cpu import TowerInputs, cpu_tower
from engine.runtime.session import open_session, run
from engine.spec import QwenVisionSpec, SiglipSpec

# Activations of one call stay below a few hundred MiB for towers of a thousand dimensions; one image may exceed it.
PATCHES_PER_CALL = 4096
# Beyond this, getting memory anew is cheap beside the call, and a rare large image should not be paid for for ever.
_KEEP_PATCHES = 2048
_ROTARY_BASE = 10000.0  # fixed in the reference implementation


class TowerInput(Protocol):
    """What the tower needs of an `ImageInput`."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """SigLIP [tiles, 3, side, side], Qwen2-VL [3, height, width]."""
        ...

    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def tokens(self) -> int: ...


class Encoder:
    """One ONNX Runtime session; any thread, one call at a time.

    An image's features do not depend, to the bit, on the images beside it.
    """

    def __init__(self, artifact: Artifact, *, threads: int) -> None:
        spec = artifact.spec.vision
        assert spec is not None, "a text-only model has no encoder"
        self._spec = spec
        self._session = open_session(cpu_tower(artifact), artifact, threads)

    def encode(self, images: Sequence[TowerInput]) -> list[NDArray[np.float32]]:
        """One [tokens, hidden] per image; as few calls as PATCHES_PER_CALL allows.

        SigLIP takes the tiles of all images together; Qwen2-VL's images share a call when they have the same grid
        (on a CPU, padding images of several sizes to one costs more than a call saves).
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
        features: list[NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(images)
        for grid, members in _same_grid(images):
            frames, height, width = grid
            cosine, sine = vision_rotary(spec, height, width)
            inputs = {
                TowerInputs.PIXELS: np.concatenate([cut_patches(spec, images[member].pixels) for member in members]),
                TowerInputs.SHAPE: np.array([frames * len(members), height * width, -1]),
                TowerInputs.COSINE: cosine,
                TowerInputs.SINE: sine,
            }
            rows = self._run(frames * height * width * len(members), inputs)
            for member, part in zip(members, np.split(rows, len(members)), strict=True):
                features[member] = part
        return features

    def _run(self, patches: int, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        return run(self._session, inputs, TowerInputs.FEATURES, shrink=patches > _KEEP_PATCHES)


def _same_grid(images: Sequence[TowerInput]) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
    """Grids and the images that have them, cut into calls."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(image.grid, []).append(number)
    for grid, members in groups.items():
        per_call = max(1, PATCHES_PER_CALL // (grid[0] * grid[1] * grid[2]))
        for start in range(0, len(members), per_call):
            yield grid, members[start : start + per_call]


def cut_patches(spec: QwenVisionSpec, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[3, height, width] to [patches, 3 * patch**2], in the order in which the merger joins them."""
    side, merge = spec.patch, spec.merge
    rows, columns = (length // (merge * side) for length in pixels.shape[1:])
    blocks = pixels.reshape(3, rows, merge, side, columns, merge, side)
    return blocks.transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3 * side**2)


def vision_rotary(spec: QwenVisionSpec, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine [height * width, head_dim / 2] in the order of patches grouped by `merge`.

    Half of the angles turn with the row, half with the column (Qwen2VLVisionRotaryEmbedding).
    """
    quarter = spec.hidden // spec.heads // 2
    exponents = np.arange(0, quarter, 2, dtype=np.float32) / np.float32(quarter)
    inv_freq = np.float32(1.0) / np.power(np.float32(_ROTARY_BASE), exponents, dtype=np.float32)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    places = np.stack([_grouped(axis, spec.merge) for axis in (rows, columns)], axis=1).astype(np.float32)
    angles = (places[:, :, None] * inv_freq).reshape(height * width, -1).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _grouped(axis: NDArray[np.int64], merge: int) -> NDArray[np.int64]:
    height, width = axis.shape
    blocks = axis.reshape(height // merge, merge, width // merge, merge)
    return blocks.transpose(0, 2, 1, 3).reshape(-1)
