"""Idefics3's tower and connector: tiles in, feature rows out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engine.graphs.builder import GraphBuilder
from engine.graphs.dialect import TowerDialect
from engine.graphs.tower import normalise, tower
from engine.spec import SiglipSpec


def siglip_graph(dialect: TowerDialect, spec: SiglipSpec, pixels: ir.Value) -> ir.Value:
    """uint8 [tiles, 3, tile, tile] to [tiles * tokens_per_tile, hidden of the decoder]."""
    builder = dialect.builder
    side, patch = spec.tile // spec.patch, spec.patch
    patches = builder.reshape(pixels, -1, 3, side, patch, side, patch)
    patches = builder.op("Transpose", patches, perm=[0, 2, 4, 1, 3, 5])
    patches = builder.reshape(patches, -1, 3 * patch * patch)
    x = dialect.linear(normalise(builder, patches, spec.norm, patch * patch), "vision.patch")
    indices = builder.table("vision.position_index", position_index(side))
    position = builder.op("Gather", builder.weight("vision.position.weight"), indices, axis=0)
    x = builder.op("Add", builder.reshape(x, -1, side * side, spec.hidden), position)
    x = tower(dialect, spec, builder.reshape(x, -1, spec.hidden))
    return dialect.linear(_pixel_shuffle(builder, x, spec), "vision.projection")


def position_index(side: int) -> NDArray[np.int64]:
    """Which learned position each of side * side patches takes.

    Not always 0, 1, 2, ...: Idefics3VisionEmbeddings buckets i * (1 / side) between the multiples of 1 / side in
    float32, and rounding puts some patches into their neighbour's bucket. Checkpoints were trained that way.
    """
    step = 1 / side
    # Multiples up to, not including, 1; in double as torch.arange computes them, then rounded.
    boundaries = (step + np.arange(int(np.ceil((1.0 - step) / step))) * step).astype(np.float32)
    places = np.arange(side, dtype=np.float32) * (np.float32(1.0) / np.float32(side))
    buckets = np.searchsorted(boundaries, np.minimum(places, np.float32(1.0 - 1e-6)), side="right")
    indices: NDArray[np.int64] = (buckets[:, None] * side + buckets[None, :]).reshape(-1).astype(np.int64)
    return indices


def _pixel_shuffle(builder: GraphBuilder, x: ir.Value, spec: SiglipSpec) -> ir.Value:
    """shuffle x shuffle neighbouring patches become one row (Shi et al. 2016, backwards)."""
    side, factor = spec.tile // spec.patch, spec.shuffle
    x = builder.reshape(x, -1, side // factor, factor, side // factor, factor, spec.hidden)
    x = builder.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    return builder.reshape(x, -1, factor * factor * spec.hidden)
