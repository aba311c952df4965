"""The transformer blocks that vision towers share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from engine.graphs.dialect import TowerDialect
from engine.spec import PixelNorm, QwenVisionSpec, SiglipSpec


def normalise(dialect: TowerDialect, pixels: ir.Value, norm: PixelNorm, channel: tuple[int, ...]) -> ir.Value:
    """uint8 [T, 3 * n], each channel of shape `channel` = (n,), to what the tower was trained on.

    Where `channel` has several axes, they are behind that of the channels: [T, 3, *channel].
    """
    builder = dialect.builder
    values = np.array([norm.std, norm.mean], np.float64)
    std, mean = values.repeat(channel[0], axis=1) if len(channel) == 1 else values.reshape(2, 3, *[1] * len(channel))
    scale = builder.table("vision.pixel_scale", (norm.rescale / std).astype(np.float32))
    shift = builder.table("vision.pixel_shift", (-mean / std).astype(np.float32))
    pixels = builder.op("Cast", pixels, to=int(ir.DataType.FLOAT))
    return dialect.activations(builder.op("Add", builder.op("Mul", pixels, scale), shift))


def tower(dialect: TowerDialect, spec: SiglipSpec | QwenVisionSpec, x: ir.Value) -> tuple[ir.Value, Sequence[ir.Value]]:
    """Pre-norm blocks on [T, hidden]: the norm after the last, and what each of them gave before any norm."""
    outputs = []
    normed = dialect.layer_norm(x, "vision.layers.0.attention_norm", spec.norm_eps)
    for layer in range(spec.layers):
        name = f"vision.layers.{layer}"
        windowed = isinstance(spec, QwenVisionSpec) and spec.is_windowed(layer)
        attention = dialect.attention(normed, f"{name}.qkv", windowed=windowed)
        normed, x = dialect.add_layer_norm(attention, f"{name}.out", x, f"{name}.mlp_norm", spec.norm_eps)
        mlp = dialect.activated(normed, f"{name}.up", spec.activation)
        following = f"vision.layers.{layer + 1}.attention_norm" if layer + 1 < spec.layers else "vision.norm"
        normed, x = dialect.add_layer_norm(mlp, f"{name}.down", x, following, spec.norm_eps)
        outputs.append(x)
    return normed, outputs
