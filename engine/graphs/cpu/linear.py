"""Linear layers and embedding tables in either precision."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_ir as ir

from engine.graphs.builder import MICROSOFT, GraphBuilder
from engine.spec import Precision


class Linears(Protocol):
    """How a precision multiplies by a weight, and looks up a row of it."""

    def linear(self, x: ir.Value, name: str) -> ir.Value: ...

    def embedding(self, token_ids: ir.Value, name: str) -> ir.Value: ...


def linears(builder: GraphBuilder, precision: Precision) -> Linears:
    return Int8Linears(builder) if precision == "int8" else Fp32Linears(builder)


class Fp32Linears:
    """Gemm packs a constant weight at load, and then computes a row alike whatever rows are beside it."""

    def __init__(self, builder: GraphBuilder) -> None:
        self._builder = builder

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        builder = self._builder
        bias = builder.weight(f"{name}.bias") if builder.has(f"{name}.bias") else None
        return builder.op("Gemm", x, builder.weight(f"{name}.weight"), bias, transB=1)

    def embedding(self, token_ids: ir.Value, name: str) -> ir.Value:
        return self._builder.op("Gather", self._builder.weight(f"{name}.weight"), token_ids, axis=0)


class Int8Linears:
    """Activations are quantised per row, symmetrically: byte = round(127 * x / max|x|) + 128.

    Not DynamicQuantizeMatMul: its one scale for all rows makes a row's result depend on its neighbours.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        self._builder = builder

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        builder = self._builder
        if not builder.has(f"{name}.scale"):  # a layer that is not rounded
            return Fp32Linears(builder).linear(x, name)
        step, zero = builder.constant(1 / 127, np.float32), builder.constant(128, np.uint8)
        # A row of zeros divides 0 by 0. Whatever byte that becomes, its product is multiplied by the maximum, zero.
        maximum = builder.op("ReduceMax", builder.op("Abs", x), builder.constant([-1], np.int64), keepdims=1)
        rows = builder.op("QuantizeLinear", builder.op("Div", x, maximum), step, zero)
        outputs, _ = builder.shape(f"{name}.weight")
        weight, scale = builder.weight(f"{name}.weight"), builder.weight(f"{name}.scale")
        zeros = builder.table(f"zeros.{outputs}", np.zeros(outputs, np.int8))
        # MatMulIntegerToFloat gives the same bits, but wants [in, out]: transposing for it doubles a load's memory.
        product = builder.op("QGemm", rows, step, zero, weight, scale, zeros, domain=MICROSOFT, transB=1)
        result = builder.op("Mul", product, maximum)
        return builder.op("Add", result, builder.weight(f"{name}.bias")) if builder.has(f"{name}.bias") else result

    def embedding(self, token_ids: ir.Value, name: str) -> ir.Value:
        builder = self._builder
        rows = builder.op("Gather", builder.weight(f"{name}.weight"), token_ids, axis=0)
        scales = builder.op("Gather", builder.weight(f"{name}.scale"), token_ids, axis=0)
        scales = builder.op("Unsqueeze", scales, builder.constant([1], np.int64))
        return builder.op("Mul", builder.op("Cast", rows, to=int(ir.DataType.FLOAT)), scales)
