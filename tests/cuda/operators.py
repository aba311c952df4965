"""Operators of ONNX and of ONNX Runtime, in torch, as the CUDA provider computes them.

16-bit inputs are computed in fp32 and rounded once, at the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional

MICROSOFT = "com.microsoft"

Operator = Callable[..., Tensor | Sequence[Tensor | None]]
OPERATORS: dict[tuple[str, str], Operator] = {}

_DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.BOOL: torch.bool,
}


def operator(name: str, domain: str = "") -> Callable[[Operator], Operator]:
    """Registers a function of inputs (None if absent) and attributes by keyword."""

    def register(function: Operator) -> Operator:
        OPERATORS[domain, name] = function
        return function

    return register


def torch_dtype(element_type: int) -> torch.dtype:
    return _DTYPES[element_type]


def from_numpy(array: NDArray[Any]) -> Tensor:
    """A copy; knows ml_dtypes' bfloat16, which torch does not."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def attribute(item: onnx.AttributeProto) -> Any:
    """A number, string, list or tensor."""
    value = onnx.helper.get_attribute_value(item)
    if isinstance(value, onnx.TensorProto):
        return from_numpy(numpy_helper.to_array(value))
    return value.decode() if isinstance(value, bytes) else value


def initializer(tensor: onnx.TensorProto, weights: Mapping[str, Tensor | NDArray[Any]]) -> Tensor:
    """A constant of the model, or external data from `weights`, which must be what the model declares."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return from_numpy(numpy_helper.to_array(tensor))
    weight = weights[tensor.name]
    value = weight if isinstance(weight, Tensor) else from_numpy(weight)
    declared = torch_dtype(tensor.data_type), list(tensor.dims)
    assert (value.dtype, list(value.shape)) == declared, f"{tensor.name} is {value.dtype} {value.shape}, not {declared}"
    return value


def wide(x: Tensor) -> Tensor:
    """16-bit floats to fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _elementwise(function: Callable[..., Tensor]) -> Operator:
    def apply(*inputs: Tensor) -> Tensor:
        assert len({x.dtype for x in inputs}) == 1, f"{function.__name__} of {[x.dtype for x in inputs]}"
        return function(*map(wide, inputs)).to(inputs[0].dtype)

    return apply


def _predicate(function: Callable[..., Tensor]) -> Operator:
    return lambda *inputs: function(*inputs)


OPERATORS |= {
    ("", "Abs"): _elementwise(torch.abs),
    ("", "Add"): _elementwise(torch.add),
    ("", "Cos"): _elementwise(torch.cos),
    ("", "Exp"): _elementwise(torch.exp),
    ("", "Identity"): _elementwise(lambda x: x),
    ("", "Max"): _elementwise(torch.maximum),
    ("", "Min"): _elementwise(torch.minimum),
    ("", "Mul"): _elementwise(torch.mul),
    ("", "Neg"): _elementwise(torch.neg),
    ("", "Reciprocal"): _elementwise(torch.reciprocal),
    ("", "Round"): _elementwise(torch.round),
    ("", "Sigmoid"): _elementwise(torch.sigmoid),
    ("", "Sin"): _elementwise(torch.sin),
    ("", "Sqrt"): _elementwise(torch.sqrt),
    ("", "Sub"): _elementwise(torch.sub),
    ("", "Tanh"): _elementwise(torch.tanh),
    ("", "And"): _predicate(torch.logical_and),
    ("", "Equal"): _predicate(torch.eq),
    ("", "Greater"): _predicate(torch.gt),
    ("", "GreaterOrEqual"): _predicate(torch.ge),
    ("", "Less"): _predicate(torch.lt),
    ("", "LessOrEqual"): _predicate(torch.le),
    ("", "Not"): _predicate(torch.logical_not),
    ("", "Where"): torch.where,
}


@operator("Div")
def _div(a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype
    return (wide(a) / wide(b)).to(a.dtype) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Cast")
def _cast(x: Tensor, to: int, saturate: int = 1) -> Tensor:
    return x.to(torch_dtype(to))


@operator("Clip")
def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return torch.clamp(x, low, high)


@operator("Gemm")
def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    assert a.dtype == b.dtype
    assert a.dim() == b.dim() == 2
    product = alpha * ((wide(a).T if transA else wide(a)) @ (wide(b).T if transB else wide(b)))
    return (product if c is None else product + beta * wide(c)).to(a.dtype)


@operator("MatMul")
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype
    return torch.matmul(wide(a), wide(b)).to(a.dtype)


@operator("MatMulInteger")
def _matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    left = a.double() - (0 if a_zero is None else a_zero.double())
    right = b.double() - (0 if b_zero is None else b_zero.double())
    return (left @ right).to(torch.int32)


@operator("MatMulNBits", MICROSOFT)
def _matmul_nbits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    group_index: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:
    assert (bits, weight_prepacked, group_index) == (8, 0, None), "only plain 8-bit weights"
    blocks = -(-K // block_size)
    assert b.shape == (N, blocks, block_size)
    assert b.dtype == torch.uint8
    assert scales.dtype == a.dtype
    zero = 128.0 if zero_points is None else zero_points.float().reshape(N, blocks, 1)
    weight = ((b.float() - zero) * wide(scales).reshape(N, blocks, 1)).reshape(N, -1)[:, :K]
    product = wide(a) @ weight.T
    return (product if bias is None else product + wide(bias)).to(a.dtype)


@operator("GatherBlockQuantized", MICROSOFT)
def _gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Tensor:
    assert bits == 8
    assert data.dtype == torch.uint8
    assert gather_axis == 0
    assert quantize_axis in (1, -1)
    zero = 128.0 if zero_points is None else zero_points.float()[indices].repeat_interleave(block_size, -1)
    rows = data[indices].float() - zero
    return (rows * wide(scales)[indices].repeat_interleave(block_size, -1)[..., : data.shape[1]]).to(scales.dtype)


@operator("QuantizeLinear")
def _quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int = 1, output_dtype: int = 0, saturate: int = 1
) -> Tensor:
    dtype = zero.dtype if zero is not None else torch_dtype(output_dtype) if output_dtype else torch.uint8
    steps = torch.round(wide(x) / _along(wide(scale), x, axis))
    limits = torch.iinfo(dtype)
    shift = 0 if zero is None else _along(zero.float(), x, axis)
    return torch.clamp(steps + shift, limits.min, limits.max).to(dtype)


@operator("DequantizeLinear")
def _dequantize(x: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int = 1) -> Tensor:
    shift = 0 if zero is None else _along(zero.float(), x, axis)
    return ((x.float() - shift) * _along(wide(scale), x, axis)).to(scale.dtype)


def _along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    """One value for all, or one per place of `axis`."""
    return (
        parameter
        if parameter.dim() == 0
        else parameter.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])
    )


@operator("SimplifiedLayerNormalization")
@operator("RMSNormalization")
def _rms_norm(x: Tensor, weight: Tensor, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    assert axis in (-1, x.dim() - 1)
    wider = wide(x)
    return (wider * torch.rsqrt(wider.square().mean(-1, keepdim=True) + epsilon) * wide(weight)).to(x.dtype)


@operator("LayerNormalization")
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    assert axis in (-1, x.dim() - 1)
    shift = None if bias is None else wide(bias)
    return functional.layer_norm(wide(x), x.shape[-1:], wide(weight), shift, epsilon).to(x.dtype)


def _skip_sum(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    assert x.dtype == skip.dtype
    return (wide(x) + wide(skip) + (0 if bias is None else wide(bias))).to(x.dtype)


@operator("SkipSimplifiedLayerNormalization", MICROSOFT)
def _skip_rms_norm(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-12
) -> Sequence[Tensor | None]:
    total = _skip_sum(x, skip, bias)
    return _rms_norm(total, weight, epsilon=epsilon), None, None, total  # type: ignore[return-value]


@operator("SkipLayerNormalization", MICROSOFT)
def _skip_layer_norm(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
) -> Sequence[Tensor | None]:
    total = _skip_sum(x, skip, bias)
    return _layer_norm(total, weight, shift, epsilon=epsilon), None, None, total  # type: ignore[return-value]


@operator("Gelu")
def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return functional.gelu(wide(x), approximate=approximate).to(x.dtype)


@operator("Gelu", MICROSOFT)
def _exact_gelu(x: Tensor) -> Tensor:
    return functional.gelu(wide(x)).to(x.dtype)


@operator("BiasGelu", MICROSOFT)
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(wide(x) + wide(bias)).to(x.dtype)


@operator("FastGelu", MICROSOFT)
def _fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(wide(x) + (0 if bias is None else wide(bias)), approximate="tanh").to(x.dtype)


@operator("QuickGelu", MICROSOFT)
def _quick_gelu(x: Tensor, alpha: float = 1.702) -> Tensor:
    return (wide(x) * torch.sigmoid(alpha * wide(x))).to(x.dtype)


@operator("Softmax")
def _softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(wide(x), axis).to(x.dtype)
