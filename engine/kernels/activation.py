"""Activations inside kernels."""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl

Activation = Literal["silu_gate", "gelu", "gelu_tanh", "quick_gelu"]

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TANH = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)
_QUICK = tl.constexpr(1.702)


@triton.jit
def activate(value: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """float32 to float32, by an `Activation` or none; for silu_gate it is silu, of the gate.

    gelu is exact; gelu_tanh approximates it (Hendrycks and Gimpel 2016), where (1 + tanh(u)) / 2 = sigmoid(2 * u).
    """
    if KIND == "silu_gate":
        value = value * tl.sigmoid(value)
    elif KIND == "gelu":
        value = value * (0.5 + 0.5 * tl.erf(value * _SQRT_HALF))
    elif KIND == "gelu_tanh":
        value = value * tl.sigmoid(_TANH * (value + _CUBIC * value * value * value))
    elif KIND == "quick_gelu":
        value = value * tl.sigmoid(_QUICK * value)
    else:
        tl.static_assert(KIND == "none", "an unknown activation")
    return value
