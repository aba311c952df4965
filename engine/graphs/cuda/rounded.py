"""The decoder with activations rounded to int8 where a run says so: what measures the cost of that rounding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.checkpoints.artifact import Artifact
from engine.graphs.cuda.attention import PagedAttention
from engine.graphs.cuda.decoder import assembled
from engine.graphs.cuda.fused import Activation, FusedLayers
from engine.graphs.cuda.weights import CudaBuilder, CudaGraph
from engine.spec import DecoderSpec, FloatType

ROUNDED = "rounded"
"""An input of the graph, int32 [linear layers]: not 0 rounds the layer's activations. In `linear_names`' order."""

_LEAST = 1e-30  # a row of zeros stays one


def linear_names(spec: DecoderSpec) -> tuple[str, ...]:
    """The linear layers whose activations may be quantised, as the artifact names their weights."""
    blocks = [f"layers.{layer}.{part}" for layer in range(spec.layers) for part in ("qkv", "out", "gate_up", "down")]
    return (*blocks, "embedding" if spec.tied_head else "head")


def rounded_decoder(artifact: Artifact, activations: FloatType, positions: int) -> CudaGraph:
    """As `cuda_decoder` makes with fused linear layers, over the same weights, and with the input ROUNDED."""
    spec = artifact.spec.decoder
    builder = CudaBuilder(artifact, activations)
    attention = PagedAttention(builder, spec, positions, int8_cache=False)
    return assembled(builder, spec, RoundedLayers(builder, artifact), attention)


class RoundedLayers(FusedLayers):
    """Products of 16-bit activations that went through int8 and back on the way, or did not."""

    def __init__(self, builder: CudaBuilder, artifact: Artifact) -> None:
        names = linear_names(artifact.spec.decoder)
        super().__init__(builder, artifact, float_inputs=names)
        self._places = {name: place for place, name in enumerate(names)}
        self._rounded = builder.input(ROUNDED, np.int32, [len(names)])

    def _linear(
        self,
        x: ir.Value,
        name: str,
        *,
        norm: str | None = None,
        activation: Activation = "none",
        residual: ir.Value | None = None,
    ) -> ir.Value:
        """The norm is a node of its own, since rounding comes after it."""
        builder = self._builder
        if norm is not None:
            gain = builder.device_weight(f"{norm}.weight")
            x = builder.op("SimplifiedLayerNormalization", x, gain, axis=-1, epsilon=self._spec.norm_eps)
        x = rounded_where(builder, self._rounded, self._places[name], x)
        return super()._linear(x, name, activation=activation, residual=residual)


def rounded_where(builder: CudaBuilder, flags: ir.Value, place: int, x: ir.Value) -> ir.Value:
    """x, or where the flag at that place is not 0, x rounded to int8 and back."""
    chosen = builder.op("Gather", flags, builder.constant([place], np.int64), axis=0)
    chosen = builder.op("Cast", chosen, to=int(ir.DataType.BOOL))
    return builder.op("Where", chosen, _through_int8(builder, x), x)


def _through_int8(builder: CudaBuilder, x: ir.Value) -> ir.Value:
    """Per token, symmetric, as the kernels quantise: round(127 * x / max|x|), half to even."""
    wide = builder.op("Cast", x, to=int(ir.DataType.FLOAT))
    largest = builder.op("ReduceMax", builder.op("Abs", wide), builder.constant([-1], np.int64), keepdims=1)
    step = builder.op("Mul", largest, builder.constant(1 / 127, np.float32))
    step = builder.op("Max", step, builder.constant(_LEAST, np.float32))
    values = builder.op("Round", builder.op("Div", wide, step))
    return builder.op("Cast", builder.op("Mul", values, step), to=builder.onnx_type)
