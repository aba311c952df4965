"""Qwen2-VL's tower and merger: patches in, feature rows out."""

from __future__ import annotations

import onnx_ir as ir

from engine.graphs.dialect import TowerDialect
from engine.graphs.tower import normalise, tower
from engine.spec import QwenVisionSpec


def qwen_vision_graph(dialect: TowerDialect, spec: QwenVisionSpec, patches: ir.Value) -> ir.Value:
    """uint8 [N, 3 * temporal_patch * patch * patch], grouped by `merge`, to [N / merge**2, hidden of the decoder]."""
    builder = dialect.builder
    pixels = normalise(builder, patches, spec.norm, spec.temporal_patch * spec.patch**2)
    x = tower(dialect, spec, dialect.linear(pixels, "vision.patch"))
    merged = builder.reshape(x, -1, spec.merge**2 * spec.hidden)
    return dialect.linear(dialect.activation(dialect.linear(merged, "vision.merger"), "gelu"), "vision.projection")
