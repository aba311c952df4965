"""The towers and mergers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches in, feature rows out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from engine.graphs.dialect import TowerDialect
from engine.graphs.tower import normalise, tower
from engine.spec import QwenVisionSpec

TAPS = 4  # learned positions around a patch's place, between which it lies


@dataclass(frozen=True, slots=True)
class LearnedPositions:
    """Rows of the learned positions, integers [TAPS, N], and how much of each a patch takes, float32 [TAPS, N, 1]."""

    rows: ir.Value
    weights: ir.Value


def qwen_vision_graph(
    dialect: TowerDialect, spec: QwenVisionSpec, patches: ir.Value, positions: LearnedPositions | None = None
) -> ir.Value:
    """uint8 [N, 3, frames, patch * patch], grouped by `merge`, to [N / merge**2, feature_width of the decoder].

    Of a temporal patch's frames all are given, or one, a still image, which stands in each. `positions` are there if
    `spec.position_side` is.
    """
    builder = dialect.builder
    pixels = normalise(dialect, patches, spec.norm, (1, 1))
    frames = builder.op("Expand", pixels, builder.constant([1, 1, spec.temporal_patch, 1], np.int64))
    x = dialect.linear(builder.reshape(frames, -1, 3 * spec.temporal_patch * spec.patch**2), "vision.patch")
    if positions is not None:
        x = builder.op("Add", x, _interpolated(dialect, positions))
    normed, outputs = tower(dialect, spec, x)
    features = [_merged(dialect, _grouped(dialect, spec, normed), "vision")]
    for number, layer in enumerate(spec.deepstack):
        name = f"vision.deepstack.{number}"
        grouped = _grouped(dialect, spec, outputs[layer])
        features.append(_merged(dialect, dialect.layer_norm(grouped, f"{name}.norm", spec.norm_eps), name))
    return features[0] if len(features) == 1 else builder.op("Concat", *features, axis=1)


def _grouped(dialect: TowerDialect, spec: QwenVisionSpec, x: ir.Value) -> ir.Value:
    """merge x merge neighbouring patches side by side."""
    return dialect.builder.reshape(x, -1, spec.merge**2 * spec.hidden)


def _merged(dialect: TowerDialect, grouped: ir.Value, name: str) -> ir.Value:
    return dialect.linear(dialect.activated(grouped, f"{name}.merger", "gelu"), f"{name}.projection")


def _interpolated(dialect: TowerDialect, positions: LearnedPositions) -> ir.Value:
    """[N, hidden], summed in fp32 as the reference does."""
    builder = dialect.builder
    table = dialect.weight("vision.position.weight")
    parts = []
    for tap in range(TAPS):
        number = builder.constant(tap, np.int64)
        rows = builder.op("Gather", table, builder.op("Gather", positions.rows, number, axis=0), axis=0)
        rows = builder.op("Cast", rows, to=int(ir.DataType.FLOAT))
        parts.append(builder.op("Mul", rows, builder.op("Gather", positions.weights, number, axis=0)))
    total = parts[0]
    for part in parts[1:]:
        total = builder.op("Add", total, part)
    return dialect.activations(total)
