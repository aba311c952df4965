"""Vision towers in the wheel's own operators, and what their graphs are given."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from engine.graphs.builder import MICROSOFT
from engine.graphs.cuda.linear import cuda_linears
from engine.graphs.cuda.weights import CudaBuilder
from engine.spec import QwenVisionSpec, SiglipSpec


class TowerInputs:
    """Names in the graph: T patches of B sequences that attend each to itself; all on the device."""

    PIXELS = "pixels"  # uint8: SigLIP [tiles, 3, tile, tile], Qwen2-VL [T, 3, frames or 1, patch**2]
    STARTS = "starts"  # int32 [B + 1]: where each sequence's patches begin, and T
    OFFSET = "offset"  # int32 [B, patches of the longest]: places of real patches, then of padding, if it were padded
    COSINE = "cosine"  # [T, head_dim / 2], float32 for activations of float32, else float16; Qwen2-VL only
    SINE = "sine"
    TAPS = "taps"  # int32 [4, T]; with learned positions that are interpolated only
    TAP_WEIGHTS = "tap_weights"  # float32 [4, T, 1]
    WINDOW_STARTS = "window_starts"  # as STARTS and OFFSET for windows, one behind the other; with windows only
    WINDOW_OFFSET = "window_offset"
    FEATURES = "features"  # activations [tokens, feature_width of the decoder]


class CudaTowerDialect:
    """Implements `TowerDialect`."""

    def __init__(self, builder: CudaBuilder, spec: SiglipSpec | QwenVisionSpec) -> None:
        self.builder = builder
        self._spec = spec
        self._linears = cuda_linears(builder, int8=False)
        starts = builder.input(TowerInputs.STARTS, np.int32, ["B1"])
        self._sequences = self._windows = (builder.input(TowerInputs.OFFSET, np.int32, ["B", "L"]), starts)
        if isinstance(spec, QwenVisionSpec) and spec.window:
            starts = builder.input(TowerInputs.WINDOW_STARTS, np.int32, ["W1"])
            self._windows = (builder.input(TowerInputs.WINDOW_OFFSET, np.int32, ["W", "P"]), starts)
        # The operator has no kernel for bfloat16. Queries, keys and values follow a norm and stay far below the
        # largest float16, and it rounds them eight times finer.
        self._narrow = builder.dtype == ml_dtypes.bfloat16
        self._rotary: tuple[ir.Value, ...] = ()
        if isinstance(spec, QwenVisionSpec):
            dtype = np.float16 if self._narrow else builder.dtype.type
            half = spec.hidden // spec.heads // 2
            tables = (TowerInputs.COSINE, TowerInputs.SINE)
            self._rotary = tuple(builder.input(name, dtype, ["T", half]) for name in tables)

    def weight(self, name: str) -> ir.Value:
        return self.builder.device_weight(name)

    def activations(self, x: ir.Value) -> ir.Value:
        if self.builder.dtype == np.float32:
            return x
        return self.builder.op("Cast", x, to=self.builder.onnx_type)

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        return self._linears.linear(x, name)

    def activated(self, x: ir.Value, name: str, kind: str) -> ir.Value:
        if kind == "silu_gate":
            gate, up = self.builder.ops("Split", self.linear(x, name), outputs=2, axis=-1, num_outputs=2)
            return self.builder.op("Mul", self.builder.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0), up)
        if kind == "quick_gelu":
            return self.builder.op("QuickGelu", self.linear(x, name), domain=MICROSOFT, alpha=1.702)
        product, bias = self._product(x, name)
        if kind == "gelu_pytorch_tanh":
            return self.builder.op("FastGelu", product, bias, domain=MICROSOFT)
        assert kind == "gelu"
        if bias is None:
            return self.builder.op("Gelu", product, domain=MICROSOFT)
        return self.builder.op("BiasGelu", product, bias, domain=MICROSOFT)

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        if not self.builder.has(f"{name}.bias"):
            weight = self.weight(f"{name}.weight")
            return self.builder.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon)
        affine = (self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))
        return self.builder.op("LayerNormalization", x, *affine, axis=-1, epsilon=epsilon)

    def add_layer_norm(
        self, x: ir.Value, name: str, residual: ir.Value, norm: str, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        product, bias = self._product(x, name)
        has_shift = self.builder.has(f"{norm}.bias")
        affine = [self.weight(f"{norm}.{part}") for part in (("weight", "bias") if has_shift else ("weight",))]
        normed, _, _, total = self.builder.ops(
            "SkipLayerNormalization" if has_shift else "SkipSimplifiedLayerNormalization",
            *(product, residual, *affine, bias),
            outputs=4,
            domain=MICROSOFT,
            epsilon=epsilon,
        )
        return normed, total

    def attention(self, x: ir.Value, name: str, *, windowed: bool = False) -> ir.Value:
        """One product that is split: a single image waits for launches, and three products are more of them."""
        packed = self.linear(x, name)
        if self._narrow:
            packed = self.builder.op("Cast", packed, to=int(ir.DataType.FLOAT16))
        query, key, value = self.builder.ops("Split", packed, outputs=3, axis=-1, num_outputs=3)
        if self._rotary:
            query, key = self._rotate(query), self._rotate(key)
        output = self.builder.op(
            "PackedMultiHeadAttention",
            *(query, key, value, None, *(self._windows if windowed else self._sequences)),
            domain=MICROSOFT,
            num_heads=self._spec.heads,
        )
        return self.builder.op("Cast", output, to=self.builder.onnx_type) if self._narrow else output

    def _product(self, x: ir.Value, name: str) -> tuple[ir.Value, ir.Value | None]:
        """x @ weight.T, and the bias for the operator that follows to add."""
        bias = self.weight(f"{name}.bias") if self.builder.has(f"{name}.bias") else None
        return self.builder.op("Gemm", x, self.weight(f"{name}.weight"), transB=1), bias

    def _rotate(self, x: ir.Value) -> ir.Value:
        """All patches as one sequence: each has a row of its own in the tables."""
        builder = self.builder
        batch = builder.op("Unsqueeze", x, builder.constant([0], np.int64))
        start = builder.constant([0], np.int64)
        rotated = builder.op("RotaryEmbedding", batch, start, *self._rotary, domain=MICROSOFT)
        return builder.reshape(rotated, -1, self._spec.hidden)
