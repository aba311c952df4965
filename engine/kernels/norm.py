"""Normalising and quantising rows: one launch, one read of each value, whatever comes before and after.

The kernels keep a row in registers: it lies there in `pieces`, of which every thread holds 16 bytes each. A sum or a
maximum adds up the pieces of a thread first and then the threads, in an order that depends on the width alone, so that
a row is the same to the bit whatever rows are beside it.

Quantised rows follow the one int8 format (engine/checkpoints/quantise.py): scale = max|row| / 127 in float32, bytes
the nearest to value / scale, half to even. A row of zeros has zeros and scale 0, as has one that stays below 2 ** -120,
which only bfloat16 can hold. A row with a value that is not finite has a scale that is not a number, and bytes that
mean nothing: its product is not a number, those of its neighbours are what they would be.

Type A is float16 or bfloat16. What a norm gives is rounded to A before it is quantised, so that int8 and 16-bit
products start from the same values, those that a norm of its own would hand on. Activations are not: they are quantised
from float32, where a gated product beyond float16's range is still a number.

`residual` adds before the norm: the sum is rounded to A, `total` (if given) takes it, and the norm is that of the
rounded sum. So to add in the linear layer before, or here, gives the same bits. `total` may be x or the residual.

Launches go to the current stream of the current device.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.activation import Activation, activate
from engine.kernels.compiled import keyed
from engine.kernels.launcher import Launcher
from engine.kernels.overlap import BESIDE as _BESIDE
from engine.kernels.overlap import let_next_begin, wait_for_last
from engine.kernels.pointer import Tensor

Norm = Literal["none", "rms", "layer"]

VECTOR = 8  # values of 16 bits that a thread loads at once
MOST_PIECES = 4  # beyond it a row gets more threads
MOST_WARPS = 16
MANY_ROWS = 1024  # from here on there are more rows than warps that run at once, and narrow ones share a program
ROWS_TOGETHER = 4
ACTIVATION_TYPES = (torch.float16, torch.bfloat16)

_SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: added to a small number, the last bits of the sum are its integer
BESIDE = tl.constexpr(_BESIDE)
_INFINITY = tl.constexpr(0x7F800000)  # bits
_SMALLEST = tl.constexpr(2.0**-120)  # 127 / peak is finite above
_NORMAL = tl.constexpr(2.0**-126)  # the device's rsqrt takes what is smaller for 0


class Tile(NamedTuple):
    """How a program goes over its rows: pieces of `columns` values, `rows` rows at once, by `warps` warps."""

    columns: int
    rows: int
    warps: int


def tile_of(count: int, width: int) -> Tile:
    """For `count` rows of `width` values of 16 bits: as few warps as hold a row in MOST_PIECES pieces."""
    warps = 1
    while warps < MOST_WARPS and warps * 32 * VECTOR * MOST_PIECES < width:
        warps *= 2
    columns = warps * 32 * VECTOR
    rows = ROWS_TOGETHER if warps == 1 and count >= MANY_ROWS else 1
    return Tile(columns, rows, warps * rows)


def quantise_rows(
    x: Tensor,
    rows: Tensor,
    scales: Tensor,
    *,
    norm: Norm = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """norm(x + residual) to int8, a scale per row.

    x A[T, K]; rows int8 [T, K]; scales float32 [T]; norm_weight, norm_bias A[K]; residual, total A[T, K].
    `norm` as in `normalise_rows`. Raises ValueError for shapes and types that do not fit together.
    """
    if rows.dtype != torch.int8 or scales.dtype != torch.float32 or tuple(scales.shape) != tuple(x.shape[:1]):
        raise ValueError(f"quantised rows are int8 with float32 scales [{x.shape[0]}], not {_named(rows, scales)}")
    _normalise(x, rows, scales, norm, norm_weight, norm_bias, epsilon, residual, total)


def normalise_rows(
    x: Tensor,
    out: Tensor,
    *,
    norm: Norm,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """norm(x + residual), computed in float32 and rounded once. x, out, residual, total A[T, K].

    rms: x / sqrt(mean(x ** 2) + epsilon) * weight (Zhang and Sennrich 2019); layer: (x - mean) / sqrt(variance +
    epsilon) * weight + bias (Ba et al. 2016); none leaves x. norm_weight, norm_bias A[K]. A row without any deviation
    gives zeros (or the bias) even if epsilon is 0. Raises ValueError for shapes and types that do not fit together.
    """
    if out.dtype != x.dtype:
        raise ValueError(f"normalised rows are of x's type, {x.dtype}, not {_named(out)}")
    _normalise(x, out, None, norm, norm_weight, norm_bias, epsilon, residual, total)


def act_quantise(x: Tensor, rows: Tensor, scales: Tensor, *, activation: Activation) -> None:
    """activation(x) to int8, a scale per row: of a product whose own kernel does not activate.

    rows int8 [T, I]; scales float32 [T]. silu_gate: x A[T, 2 * I], gate and up side by side, to silu(gate) * up; the
    others: x A[T, I]. gelu is exact (by erf), gelu_tanh its usual approximation (Hendrycks and Gimpel 2016),
    quick_gelu x * sigmoid(1.702 * x). Raises ValueError for shapes and types that do not fit together.
    """
    count, width = rows.shape
    given = (count, 2 * width if activation == "silu_gate" else width)
    if x.dtype not in ACTIVATION_TYPES or tuple(x.shape) != given:
        raise ValueError(f"{activation} into {_named(rows)} takes 16-bit floats {list(given)}, not {_named(x)}")
    if rows.dtype != torch.int8 or scales.dtype != torch.float32 or tuple(scales.shape) != (count,):
        raise ValueError(f"quantised rows are int8 with float32 scales [{count}], not {_named(rows, scales)}")
    if not count:
        return
    columns, together, warps = tile_of(count, width)
    _launcher(_current_device(), activating=True)(
        (-(-count // together), 1, 1),
        (x, rows, scales),
        (count,),
        (width, activation, columns, together),
        (("num_warps", warps),),
    )


def _normalise(
    x: Tensor,
    out: Tensor,
    scales: Tensor | None,
    norm: Norm,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    residual: Tensor | None,
    total: Tensor | None,
) -> None:
    count, width = x.shape
    if x.dtype not in ACTIVATION_TYPES or not width:
        raise ValueError(f"rows are 16-bit floats of at least one value, not {_named(x)}")
    if (weight is None) != (norm == "none") or (bias is not None and norm != "layer"):
        raise ValueError(f"norm {norm}: rms and layer take a weight, layer also a bias, none neither")
    if total is not None and residual is None:
        raise ValueError("a total is stored of x and a residual, and there is no residual")
    for tensor, shape in ((out, (count, width)), (residual, (count, width)), (total, (count, width))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"for rows {_named(x)} {list(shape)} are needed, not {_named(tensor)}")
    for tensor in (weight, bias):
        if tensor is not None and (tuple(tensor.shape) != (width,) or tensor.dtype != x.dtype):
            raise ValueError(f"a norm of rows {_named(x)} has weights {x.dtype} [{width}], not {_named(tensor)}")
    if not count:
        return
    columns, together, warps = tile_of(count, width)
    _launcher(_current_device(), activating=False)(
        (-(-count // together), 1, 1),
        (x, residual, total, weight, bias, out, scales),
        (count,),
        (width, norm, epsilon, columns, together),
        (("num_warps", warps),),
    )


def _current_device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # type: ignore[no-untyped-call]


@lru_cache
def _launcher(device: int, *, activating: bool) -> Launcher:  # noqa: ARG001  # one for each device
    return Launcher(_activated_rows if activating else _normalised_rows)


def _named(*tensors: Tensor) -> str:
    return " and ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)


@triton.jit
def _sums(values: tl.tuple) -> tl.tensor:
    """Over each row of the pieces, [ROWS, 1]."""
    sums = values[0]
    for piece in tl.static_range(1, len(values)):
        sums += values[piece]
    return tl.sum(sums, 1)[:, None]


@triton.jit
def _add(values: tl.tuple, others: tl.tuple) -> tl.tuple:
    sums: tl.tuple = ()
    for piece in tl.static_range(len(values)):
        sums += (values[piece] + others[piece].to(tl.float32),)
    return sums


@triton.jit
def _multiply(values: tl.tuple, others: tl.tuple) -> tl.tuple:
    products: tl.tuple = ()
    for piece in tl.static_range(len(values)):
        products += (values[piece] * others[piece].to(tl.float32),)
    return products


@triton.jit
def _centre(values: tl.tuple, WIDTH: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tuple:
    """Less their mean, and still 0 beyond the row's end. Rounded as it should be: equal values leave nothing."""
    mean = tl.div_rn(_sums(values), WIDTH + 0.0)
    centred: tl.tuple = ()
    for piece in tl.static_range(len(values)):
        columns = (piece * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        centred += (tl.where(columns < WIDTH, values[piece] - mean, 0.0),)
    return centred


@triton.jit
def _quantise(values: tl.tuple) -> tl.tensor:
    """(int8 of each piece float32 [ROWS, COLUMNS], scales [ROWS])."""
    # The bits of magnitudes are ordered as they are, and what is not a number comes after infinity.
    magnitudes = [value.to(tl.int32, bitcast=True) & 0x7FFFFFFF for value in values]
    largest = magnitudes[0]
    for piece in tl.static_range(1, len(values)):
        largest = tl.maximum(largest, magnitudes[piece])
    bits = tl.max(largest, 1)
    peak = bits.to(tl.float32, bitcast=True)
    small = peak < _SMALLEST
    scales = tl.where(small, 0.0, tl.div_rn(peak, 127.0))
    scales = tl.where(bits >= _INFINITY, float("nan"), scales)
    factor = tl.where(small, 0.0, tl.div_rn(127.0, tl.where(small, 1.0, peak)))[:, None]
    shift = tl.full(values[0].shape, _SHIFT, tl.float32)
    return [tl.fma(value, factor, shift).to(tl.int32, bitcast=True).to(tl.int8) for value in values], scales


@triton.jit
def _inverse_root(mean: tl.tensor) -> tl.tensor:
    """1 / sqrt(mean), and 0 for 0: a row of zeros stays one."""
    return tl.where(mean < _NORMAL, 0.0, tl.rsqrt(tl.where(mean < _NORMAL, 1.0, mean)))


@triton.jit
def _normalise_values(
    values: tl.tuple,
    weights: tl.tuple,
    biases: tl.tuple,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tuple:
    """Pieces float32 [ROWS, COLUMNS], 0 beyond the row's end, to their norm. biases: empty, or as the weights."""
    if NORM == "layer":
        values = _centre(values, WIDTH, COLUMNS)
    factor = _inverse_root(_sums(_multiply(values, values)) / WIDTH + EPSILON)
    normed = _multiply([value * factor for value in values], weights)
    return _add(normed, biases) if len(biases) > 0 else normed


@triton.jit
def _load(
    source: tl.tensor, first: tl.tensor, inside: tl.tensor, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tuple:
    """Pieces [ROWS, COLUMNS] of rows that begin at `first` [ROWS, 1]; 0 beyond their end, and where not `inside`."""
    values: tl.tuple = ()
    for piece in tl.static_range(triton.cdiv(WIDTH, COLUMNS)):
        columns = (piece * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        values += (tl.load(source + first + columns, mask=inside & (columns < WIDTH), other=0.0),)
    return values


@triton.jit
def _store(
    target: tl.tensor, first: tl.tensor, inside: tl.tensor, values: tl.tuple, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """What `_load` would load."""
    for piece in tl.static_range(len(values)):
        columns = (piece * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        value = values[piece].to(target.dtype.element_ty)
        tl.store(target + first + columns, value, mask=inside & (columns < WIDTH))


@keyed
@triton.jit(do_not_specialize=["count"])
def _normalised_rows(
    x: tl.tensor,
    residual: tl.tensor,
    total: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    count: tl.tensor,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    """Program i takes rows i * ROWS and on of `count`. out: int8 if there are scales, else A."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, inside = row.to(tl.int64)[:, None] * WIDTH, (row < count)[:, None]
    # All loads are on their way before a value is waited for: the compiler would load weights behind the first sum, and
    # wait for memory twice, but it moves no load over a barrier. Each row has weights of its own, or they would cross
    # from warp to warp.
    weights, biases, added = (), (), ()
    if weight is not None:
        weights = _load(weight, first * 0, inside, WIDTH, COLUMNS)
    if bias is not None:
        biases = _load(bias, first * 0, inside, WIDTH, COLUMNS)
    wait_for_last(EARLY)
    if count <= BESIDE:
        let_next_begin(EARLY)
    if residual is not None:
        added = _load(residual, first, inside, WIDTH, COLUMNS)
    if (weight is not None) or (residual is not None):
        tl.debug_barrier()
    values = _load(x, first, inside, WIDTH, COLUMNS)
    A: tl.constexpr = x.dtype.element_ty
    values = [value.to(tl.float32) for value in values]
    if residual is not None:
        values = [value.to(A) for value in _add(values, added)]
        if total is not None:
            _store(total, first, inside, values, WIDTH, COLUMNS)
        values = [value.to(tl.float32) for value in values]
    if NORM != "none":
        values = _normalise_values(values, weights, biases, WIDTH, NORM, EPSILON, COLUMNS)
        if scales is not None:
            values = [value.to(A).to(tl.float32) for value in values]
    if scales is not None:
        values, scale = _quantise(values)
        tl.store(scales + row, scale, mask=row < count)
    _store(out, first, inside, values, WIDTH, COLUMNS)


@keyed
@triton.jit(do_not_specialize=["count"])
def _activated_rows(
    x: tl.tensor,
    rows: tl.tensor,
    scales: tl.tensor,
    count: tl.tensor,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    """Program i takes rows i * ROWS and on of `count`. WIDTH is that of the result."""
    wait_for_last(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, inside = row.to(tl.int64)[:, None] * WIDTH, (row < count)[:, None]
    gated: tl.constexpr = KIND == "silu_gate"
    if gated:
        ups = _load(x + WIDTH, first * 2, inside, WIDTH, COLUMNS)
        tl.debug_barrier()  # as above
    loaded = _load(x, first * 2 if gated else first, inside, WIDTH, COLUMNS)
    values = [activate(value.to(tl.float32), KIND) for value in loaded]
    if gated:
        values = _multiply(values, ups)
    quantised, scale = _quantise(values)
    tl.store(scales + row, scale, mask=row < count)
    _store(rows, first, inside, quantised, WIDTH, COLUMNS)
