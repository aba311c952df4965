"""Linear layers and embedding tables: 16-bit or fp32 products, or 8-bit weights that the operator widens."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_ir as ir

from engine.graphs.builder import MICROSOFT
from engine.graphs.cuda.weights import BLOCK, CudaBuilder

Rows = tuple[int, int]


class CudaLinears(Protocol):
    """`rows` takes a part of the output channels only."""

    def linear(self, x: ir.Value, name: str, rows: Rows | None = None) -> ir.Value: ...

    def embedding(self, token_ids: ir.Value, name: str) -> ir.Value: ...


def cuda_linears(builder: CudaBuilder, *, int8: bool) -> CudaLinears:
    return BlockLinears(builder) if int8 else DenseLinears(builder)


class DenseLinears:
    """Weights [out, in] as they lie in the artifact, so that nothing is transposed on the way to the device."""

    def __init__(self, builder: CudaBuilder) -> None:
        self._builder = builder

    def linear(self, x: ir.Value, name: str, rows: Rows | None = None) -> ir.Value:
        builder = self._builder
        product = builder.op("Gemm", x, builder.device_weight(f"{name}.weight", rows=rows), transB=1)
        return with_bias(builder, product, name, rows)

    def embedding(self, token_ids: ir.Value, name: str) -> ir.Value:
        return self._builder.op("Gather", self._builder.device_weight(f"{name}.weight"), token_ids, axis=0)


class BlockLinears:
    """int8 weights as MatMulNBits reads them: blocks of BLOCK bytes around 128, each with a scale.

    The bias stays an Add: the operator's fast kernels take none.
    """

    def __init__(self, builder: CudaBuilder) -> None:
        self._builder = builder

    def linear(self, x: ir.Value, name: str, rows: Rows | None = None) -> ir.Value:
        builder = self._builder
        if not builder.has(f"{name}.scale"):  # a layer that is never rounded
            return DenseLinears(builder).linear(x, name, rows)
        outputs, inputs = builder.shape(f"{name}.weight")
        first, stop = rows or (0, outputs)
        product = builder.op(
            "MatMulNBits",
            x,
            builder.device_weight(f"{name}.weight", form="blocks", rows=rows),
            builder.device_weight(f"{name}.scale", form="block_scales", rows=rows, columns=inputs),
            domain=MICROSOFT,
            K=inputs,
            N=stop - first,
            bits=8,
            block_size=BLOCK,
        )
        return with_bias(builder, product, name, rows)

    def embedding(self, token_ids: ir.Value, name: str) -> ir.Value:
        builder = self._builder
        rows = builder.op("Gather", builder.device_weight(f"{name}.weight", form="blocks"), token_ids, axis=0)
        values = builder.reshape(builder.op("Cast", rows, to=builder.onnx_type), -1, builder.shape(f"{name}.weight")[1])
        scales = builder.op("Gather", builder.device_weight(f"{name}.scale"), token_ids, axis=0)
        scales = builder.op("Unsqueeze", scales, builder.constant([1], np.int64))
        return builder.op("Mul", builder.op("Sub", values, builder.constant(128, builder.dtype.type)), scales)


def with_bias(builder: CudaBuilder, product: ir.Value, name: str, rows: Rows | None) -> ir.Value:
    if not builder.has(f"{name}.bias"):
        return product
    return builder.op("Add", product, builder.device_weight(f"{name}.bias", rows=rows))
