"""Qwen2-VL's tower and merger: patches in, feature rows out."""

from __future__ import annotations

import onnx_ir as ir

from engine.graphs.dialect import TowerDialect
from engine.graphs.tower import normalise, tower
from engine.spec import QwenVisionSpec


def qwen_vision_graph(dialect: TowerDialect, spec: QwenVisionSpec, patches: ir.Value) -> ir.Value:
    """uint8 [N, 3 * patch * patch], grouped by `merge`, to [N / merge**2, hidden of the decoder].

    A still image stands in every frame of a temporal patch.
    """
    builder = dialect.builder
    pixels = normalise(dialect, patches, spec.norm, spec.patch**2)
    frame = builder.reshape(pixels, -1, 3, spec.patch**2)
    frames = builder.op("Concat", *(frame,) * spec.temporal_patch, axis=2)
    x = dialect.linear(builder.reshape(frames, -1, 3 * spec.temporal_patch * spec.patch**2), "vision.patch")
    merged = builder.reshape(tower(dialect, spec, x), -1, spec.merge**2 * spec.hidden)
    return dialect.linear(dialect.activated(merged, "vision.merger", "gelu"), "vision.projection")
