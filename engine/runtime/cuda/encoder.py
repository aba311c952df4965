"""Runs a vision tower on a device: images of any sizes in one packed call, nothing waited for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.checkpoints.artifact import Artifact
from engine.graphs.cuda import CudaGraph
from engine.graphs.cuda.fused import STOCK, Fusion
from engine.graphs.cuda.tower import TowerInputs, cuda_tower
from engine.runtime.cuda.session import CudaSession, GraphSession
from engine.runtime.cuda.weights import DeviceWeights, torch_type
from engine.runtime.encoder import TowerInput
from engine.runtime.vision_layout import WindowLayout, position_taps, split_frames, vision_rotary, window_layout
from engine.spec import FloatType, ModelSpec, QwenVisionSpec, SiglipSpec

PATCHES_PER_CALL = 16384  # some 40 KiB of activations each for towers of 1280 dimensions; one image may exceed it
_KEPT_GRIDS = 32  # rotary tables and positions, a few hundred KiB each


ChooseInputs = Callable[[Callable[[CudaGraph], GraphSession]], frozenset[str]]
"""Given what opens a tower's graph over the weights that are on the device: the layers that keep 16-bit rows."""


def open_encoder(
    artifact: Artifact,
    activations: FloatType,
    device: torch.device,
    fusion: Fusion = STOCK,
    register: Callable[[Any], None] | None = None,
    choose_inputs: ChooseInputs | None = None,
) -> tuple[CudaEncoder, Fusion]:
    """The tower on torch's current stream of `device`, and `fusion` with the layers that `choose_inputs` chose of it.

    `register` makes operators of our own known to the session. Raises torch.OutOfMemoryError.
    """
    weights = DeviceWeights(artifact, device)
    waits, ours = activations == "float32", register if fusion.tower else None

    def open_session(graph: CudaGraph) -> CudaSession:
        return CudaSession(graph, weights.upload(graph.weights), artifact.folder, device, ours, waits=waits)

    if fusion.tower and choose_inputs is not None:
        fusion = replace(fusion, float_inputs=fusion.float_inputs | choose_inputs(open_session))
    session = open_session(cuda_tower(artifact, activations, fusion))
    return CudaEncoder(session, artifact.spec, activations, device, weight_bytes=weights.nbytes), fusion


class CudaEncoder:
    """One session, one thread. An image's features do not depend on the images beside it, but for rounding."""

    def __init__(
        self,
        session: GraphSession,
        spec: ModelSpec,
        activations: FloatType,
        device: torch.device,
        *,
        patches_per_call: int = PATCHES_PER_CALL,
        weight_bytes: int = 0,
    ) -> None:
        """Fewer `patches_per_call` need less memory; an image with more gets a call to itself."""
        assert spec.vision is not None, "a text-only model has no encoder"
        self.weight_bytes = weight_bytes  # of the session, on the device
        self._session = session
        self._spec = spec.vision
        self._width = spec.decoder.feature_width
        self._dtype = torch_type(activations)
        self._table_dtype = torch.float32 if activations == "float32" else torch.float16
        self._device = device
        self._patches_per_call = patches_per_call
        self._grids = lru_cache(_KEPT_GRIDS)(self._grid_tables)

    def encode(self, images: Sequence[TowerInput]) -> list[torch.Tensor]:
        """One [tokens, feature_width] per image on the device, enqueued on its stream; views of one tensor per call."""
        parts = [self._parts(image) for image in images]
        features: list[torch.Tensor] = []
        for batch in self._batches([part for one in parts for part in one]):
            features += self._run(batch)
        made = iter(features)
        return [_one(list(itertools.islice(made, len(one)))) for one in parts]

    def _parts(self, image: TowerInput) -> list[_Part]:
        """An image, or the temporal patches of a video, which may be in several calls."""
        if isinstance(self._spec, SiglipSpec):
            return [_Part(image.pixels, image.grid, image.tokens)]
        pictures = split_frames(image.pixels, image.grid)
        tokens = image.tokens // len(pictures)
        return [_Part(one.pixels, (one.frames, one.height, one.width), tokens) for one in pictures]

    def rehearse(self, tokens: int) -> None:
        """Encode a blank image of about that many tokens, so that the working memory it takes is taken."""
        self.encode([_blank(self._spec, tokens)])

    def _batches(self, images: Sequence[_Part]) -> Iterator[Sequence[_Part]]:
        """A call's temporal patches are all of still images or all of videos."""
        start, patches = 0, 0
        for stop, image in enumerate(images):
            more = sum(_sequences(self._spec, image))
            fits = patches + more <= self._patches_per_call and image.grid[0] == images[start].grid[0]
            if stop > start and not fits:
                yield images[start:stop]
                start, patches = stop, 0
            patches += more
        if start < len(images):
            yield images[start:]

    def _run(self, images: Sequence[_Part]) -> Sequence[torch.Tensor]:
        lengths = [length for image in images for length in _sequences(self._spec, image)]
        starts, offset = packing(lengths)
        inputs = {
            TowerInputs.PIXELS: self._pixels(images),
            TowerInputs.STARTS: self._to_device([starts]),
            TowerInputs.OFFSET: self._to_device([offset]).view(offset.shape),
        }
        grids: list[_Grid] = []
        if isinstance(self._spec, QwenVisionSpec):
            grids = [self._grids(*image.grid[1:]) for image in images]
            inputs |= self._grid_inputs(self._spec, grids)
        tokens = [image.tokens for image in images]
        features = torch.empty((sum(tokens), self._width), dtype=self._dtype, device=self._device)
        windows = [grid.windows for grid in grids if grid.windows]
        if windows:
            inputs[TowerInputs.PIXELS] = inputs[TowerInputs.PIXELS][_joined([window.order for window in windows])]
        self._session.run(self._session.bind(inputs, {TowerInputs.FEATURES: features}))
        if windows:
            features = features[_joined([window.back for window in windows])]
        return torch.split(features, tokens)

    def _pixels(self, images: Sequence[_Part]) -> torch.Tensor:
        """All pixels in one copy, and each image cut into patches there."""
        pixels = self._to_device([image.pixels for image in images])
        spec = self._spec
        if isinstance(spec, SiglipSpec):
            return pixels.view(-1, 3, spec.tile, spec.tile)
        side, merge, frames = spec.patch, spec.merge, images[0].grid[0]
        patches = torch.empty_like(pixels).view(-1, 3, frames, side**2)
        size = 3 * frames * side**2
        start = 0
        for image in images:
            rows, columns = image.grid[1] // merge, image.grid[2] // merge
            stop = start + image.grid[1] * image.grid[2]
            planes = pixels[start * size : stop * size].view(frames, 3, rows, merge, side, columns, merge, side)
            cut = patches[start:stop].view(rows, columns, merge, merge, 3, frames, side, side)
            cut.copy_(planes.permute(2, 5, 3, 6, 1, 0, 4, 7))
            start = stop
        return patches

    def _grid_inputs(self, spec: QwenVisionSpec, grids: Sequence[_Grid]) -> dict[str, torch.Tensor]:
        inputs = {
            TowerInputs.COSINE: torch.cat([grid.cosine for grid in grids]),
            TowerInputs.SINE: torch.cat([grid.sine for grid in grids]),
        }
        if spec.position_side:
            inputs[TowerInputs.TAPS] = torch.cat([grid.positions[0] for grid in grids if grid.positions], 1)
            inputs[TowerInputs.TAP_WEIGHTS] = torch.cat([grid.positions[1] for grid in grids if grid.positions], 1)
        if spec.window:
            starts, offset = packing(np.concatenate([grid.windows.sizes for grid in grids if grid.windows]))
            inputs[TowerInputs.WINDOW_STARTS] = self._to_device([starts])
            inputs[TowerInputs.WINDOW_OFFSET] = self._to_device([offset]).view(offset.shape)
        return inputs

    def _grid_tables(self, height: int, width: int) -> _Grid:
        """Patches lie in the order of their windows, if there are any, all through the tower."""
        spec = self._spec
        assert isinstance(spec, QwenVisionSpec)
        layout = window_layout(spec, height, width) if spec.window else None
        order = layout.order if layout else slice(None)
        half = spec.hidden // spec.heads // 2
        cosine, sine = (
            self._to_device([table[order]]).view(-1, half).to(self._table_dtype)
            for table in vision_rotary(spec, height, width)
        )
        positions = None
        if spec.position_side:
            taps, weights = position_taps(spec, height, width)
            rows = self._to_device([taps[:, order].astype(np.int32)])
            positions = rows.view(taps.shape), self._to_device([weights[:, order]]).view(weights.shape)
        return _Grid(cosine, sine, positions, self._windows(layout) if layout else None)

    def _windows(self, layout: WindowLayout) -> _Windows:
        back = np.argsort(layout.tokens)
        return _Windows(layout.sizes, self._to_device([layout.order]), self._to_device([back]))

    def _to_device(self, arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
        """Flat, one after the other, through page-locked memory, which torch keeps until the copy is done."""
        size = sum(array.size for array in arrays)
        dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
        host = torch.empty(size, dtype=dtype, pin_memory=self._device.type == "cuda")
        np.concatenate([array.reshape(-1) for array in arrays], out=host.numpy())
        return host.to(self._device, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Windows:
    """Sizes of an image's windows on the host; on the device their patches in order, and the way back for tokens."""

    sizes: NDArray[np.int64]
    order: torch.Tensor
    back: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """What images of one size have in common, on the device."""

    cosine: torch.Tensor
    sine: torch.Tensor
    positions: tuple[torch.Tensor, torch.Tensor] | None
    windows: _Windows | None


def _joined(orders: Sequence[torch.Tensor]) -> torch.Tensor:
    """Orders of several images' rows as one of all their rows."""
    starts = itertools.accumulate((len(order) for order in orders), initial=0)
    return torch.cat([order + start for order, start in zip(orders, starts, strict=False)])


@dataclass(frozen=True, slots=True)
class _Part:
    """A `TowerInput` whose patches are in one call; of the Qwen families its `grid` begins with its frames."""

    pixels: NDArray[np.uint8]
    grid: tuple[int, int, int]
    tokens: int


def _one(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _blank(spec: SiglipSpec | QwenVisionSpec, tokens: int) -> TowerInput:
    if isinstance(spec, SiglipSpec):
        tiles = -(-tokens // spec.tokens_per_tile)
        return _Part(np.zeros((tiles, 3, spec.tile, spec.tile), np.uint8), (1, 0, 0), tiles * spec.tokens_per_tile)
    side = spec.merge * math.ceil(math.sqrt(tokens))
    pixels = np.zeros((3, side * spec.patch, side * spec.patch), np.uint8)
    return _Part(pixels, (1, side, side), (side // spec.merge) ** 2)


def _sequences(spec: SiglipSpec | QwenVisionSpec, image: _Part) -> list[int]:
    """How many patches each sequence of the image has: a tile attends to itself, as a whole image does."""
    if isinstance(spec, SiglipSpec):
        return [(spec.tile // spec.patch) ** 2] * len(image.pixels)
    return [image.grid[1] * image.grid[2]]


def packing(lengths: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """TowerInputs.STARTS [B + 1] and OFFSET [B, longest] of sequences of these lengths."""
    sizes = np.asarray(lengths, np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    longest = int(sizes.max())
    places = np.arange(len(sizes) * longest, dtype=np.int32).reshape(len(sizes), longest)
    real = np.arange(longest) < sizes[:, None]
    return starts, np.concatenate([places[real], places[~real]]).reshape(places.shape)
