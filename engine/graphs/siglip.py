"""Idefics3's tower and connector: tiles in, feature rows out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.graphs.builder import GraphBuilder
from engine.graphs.dialect import TowerDialect
from engine.graphs.tower import normalise, tower
from engine.spec import SiglipSpec


def siglip_graph(dialect: TowerDialect, spec: SiglipSpec, pixels: ir.Value) -> ir.Value:
    """uint8 [tiles, 3, tile, tile] to [tiles * tokens_per_tile, hidden of the decoder]."""
    builder = dialect.builder
    side, patch = spec.tile // spec.patch, spec.patch
    if spec.tile % patch:  # what fills no patch is left out, as the reference's convolution does
        start, end, axes = ([0, 0], [side * patch] * 2, [2, 3])
        pixels = builder.op("Slice", pixels, *(builder.constant(value, np.int64) for value in (start, end, axes)))
    patches = builder.reshape(pixels, -1, 3, side, patch, side, patch)
    patches = builder.op("Transpose", patches, perm=[0, 2, 4, 1, 3, 5])
    patches = builder.reshape(patches, -1, 3 * patch * patch)
    x = dialect.linear(normalise(dialect, patches, spec.norm, (patch * patch,)), "vision.patch")
    # In order. The reference finds the same places by rounding fractions, which for some sides that no released
    # checkpoint has (19, 25, 29, ...) puts a patch into its neighbour's place.
    x = builder.op("Add", builder.reshape(x, -1, side * side, spec.hidden), dialect.weight("vision.position.weight"))
    x, _ = tower(dialect, spec, builder.reshape(x, -1, spec.hidden))
    if spec.connector == "mean":
        joined = dialect.layer_norm(_mean(dialect, x, spec), "vision.mean_norm", spec.norm_eps)
    else:
        joined = _pixel_shuffle(builder, x, spec)
    return dialect.linear(joined, "vision.projection")


def _mean(dialect: TowerDialect, x: ir.Value, spec: SiglipSpec) -> ir.Value:
    """shuffle x shuffle neighbouring patches become their mean, summed in fp32."""
    builder, side, factor = dialect.builder, spec.tile // spec.patch, spec.shuffle
    x = builder.op("Cast", x, to=int(ir.DataType.FLOAT))
    x = builder.reshape(x, -1, side // factor, factor, side // factor, factor, spec.hidden)
    x = builder.op("ReduceMean", x, builder.constant([2, 4], np.int64), keepdims=0)
    return dialect.activations(builder.reshape(x, -1, spec.hidden))


def _pixel_shuffle(builder: GraphBuilder, x: ir.Value, spec: SiglipSpec) -> ir.Value:
    """shuffle x shuffle neighbouring patches become one row (Shi et al. 2016, backwards)."""
    side, factor = spec.tile // spec.patch, spec.shuffle
    x = builder.reshape(x, -1, side // factor, factor, side // factor, factor, spec.hidden)
    x = builder.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    return builder.reshape(x, -1, factor * factor * spec.hidden)
