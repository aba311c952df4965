"""A few rows times an int8 matrix: each weight is read once, at the full rate of memory, and used from its register.

Bytes: N * K of weights; the rows stay in L1. Operations: a weight is widened once and multiplied once per row. A
multiprocessor of an H100 gets some 13 weights a cycle from memory and issues 128 operations: with up to 4 rows memory
is the limit, with 8 it no longer is.

Every tensor of the loop is a vector along K of which a thread holds LANE neighbours, weights and rows alike: nothing
moves between threads before the end. Sums run in an order that K and the tile fix: the LANE values of a thread, the
steps along K, then across threads. No row depends on its neighbours.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.activation import activate
from engine.kernels.compiled import keyed
from engine.kernels.linear.epilogue import ask_columns
from engine.kernels.overlap import let_next_begin, wait_for_last

LANE = tl.constexpr(16)  # weights of one load: 16 bytes
_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def _read(vector: tl.tensor, k: tl.tensor, K: tl.constexpr, SPAN: tl.constexpr) -> tl.tensor:
    """vector[k], 0 past K, for a k that goes by steps of SPAN."""
    return tl.load(vector + k) if K % SPAN == 0 else tl.load(vector + k, mask=k < K, other=0)


@triton.jit
def _fold(values: tl.tensor, DEPTH: tl.constexpr) -> tl.tensor:
    """Sums of each thread's neighbours: [DEPTH] to [DEPTH // LANE]."""
    return tl.sum(tl.reshape(values, [DEPTH // LANE, LANE]), 1)


@triton.jit
def _inverse_root(mean: tl.tensor) -> tl.tensor:
    """1 / sqrt(mean), and 0 for 0 and what the device takes for it: a row of zeros stays one if EPSILON is 0."""
    return tl.where(mean < _NORMAL, 0.0, tl.rsqrt(tl.where(mean < _NORMAL, 1.0, mean)))


@triton.jit
def _moments(row: tl.tensor, K: tl.constexpr, DEPTH: tl.constexpr, EPSILON: tl.constexpr) -> tl.tuple:
    """Mean and 1 / sqrt(variance + EPSILON) of row [K], in two passes: a large mean costs no digits."""
    total = tl.zeros([DEPTH], tl.float32)
    for start in range(0, K, DEPTH):
        total += _read(row, start + tl.arange(0, DEPTH), K, DEPTH).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, 0), K + 0.0)
    squares = tl.zeros([DEPTH], tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)
        difference = tl.where(k < K, _read(row, k, K, DEPTH).to(tl.float32) - mean, 0.0)
        squares += difference * difference
    return mean, _inverse_root(tl.sum(squares, 0) / K + EPSILON)


@triton.jit
def _stack(vectors: tl.tuple, COUNT: tl.constexpr) -> tl.tensor:
    """Vectors [D], a power of 2, joined along new axes: [D, 2, ...], in row-major order of the new ones."""
    joined = vectors[0]
    if COUNT > 1:
        HALF: tl.constexpr = COUNT // 2
        pairs = tl.tuple(())
        for index in tl.static_range(HALF):
            pairs += (tl.join(vectors[index], vectors[index + HALF]),)
        joined = _stack(pairs, HALF)
    return joined


@triton.jit
def _finished(
    totals: tl.tuple,
    factor: tl.tensor,
    scales: tl.tuple,
    biases: tl.tuple,
    PART: tl.constexpr,
    COUNT: tl.constexpr,
    LENGTH: tl.constexpr,
) -> tl.tensor:
    """The sums of COUNT vectors [LENGTH], scaled: [COUNT], with one exchange between the threads for all of them."""
    value = tl.sum(tl.reshape(_stack(totals, COUNT), [LENGTH, COUNT]), 0)
    value *= factor * scales[PART]
    if len(biases) > 0:
        value += biases[PART]
    return value


@triton.jit
def _ask(
    lines: tl.tuple,
    norm_weight: tl.tensor,
    start: tl.tensor,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tuple:
    """Loads of UNROLL steps from start on: of each step the weights of all lines, and of each step the norm's."""
    weights, gains = tl.tuple(()), tl.tuple(())
    for step in tl.static_range(UNROLL):
        k = start + step * DEPTH + tl.arange(0, DEPTH)
        for line in tl.static_range(len(lines)):
            weights += (_read(lines[line], k, K, DEPTH * UNROLL),)
        if norm_weight is not None:
            gains += (_read(norm_weight, k, K, DEPTH * UNROLL),)
    return weights, gains


@triton.jit
def _add(
    row: tl.tensor,
    moments: tl.tuple,
    square: tl.tensor,
    totals: tl.tuple,
    weights: tl.tuple,
    gains: tl.tuple,
    norm_bias: tl.tensor,
    start: tl.tensor,
    K: tl.constexpr,
    NORM: tl.constexpr,
    DEPTH: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tuple:
    """(sum of squares, totals by line) of a row after UNROLL steps from start on."""
    values = tl.tuple(())
    for step in tl.static_range(UNROLL):
        values += (_read(row, start + step * DEPTH + tl.arange(0, DEPTH), K, DEPTH * UNROLL),)
    for step in tl.static_range(UNROLL):
        value = values[step].to(tl.float32)
        if NORM == "rms":
            square += _fold(value * value, DEPTH)
        if NORM == "layer":
            value = (value - moments[0]) * moments[1]
        if len(gains) > 0:
            value *= gains[step].to(tl.float32)
        if norm_bias is not None:
            k = start + step * DEPTH + tl.arange(0, DEPTH)
            value += _read(norm_bias, k, K, DEPTH * UNROLL).to(tl.float32)
        sums = tl.tuple(())
        for line in tl.static_range(len(totals)):
            products = weights[step * len(totals) + line].to(tl.float32) * value
            sums += (totals[line] + _fold(products, DEPTH),)
        totals = sums
    return square, totals


@keyed
@triton.jit(do_not_specialize=["rows"])
def gemv(
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    norm_weight: tl.tensor,
    norm_bias: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    EPSILON: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    """y [rows, WIDTH] = activation((norm(x) @ weight.T) * scale + bias) + residual, rows from 1 to ROWS.

    x, bias, norm_weight, norm_bias, residual, y: float16 or bfloat16; weight int8 [N, K]; scale float32 [N]; what is
    not there is None. WIDTH is N, or N / 2 with silu_gate. Program (tile) computes OUTPUTS columns of all rows.
    """
    GATE: tl.constexpr = ACTIVATION == "silu_gate"
    WIDTH: tl.constexpr = N // 2 if GATE else N
    LINES: tl.constexpr = 2 * OUTPUTS if GATE else OUTPUTS  # rows of the weight
    LENGTH: tl.constexpr = DEPTH // LANE
    if NORM == "layer":
        wait_for_last(EARLY)  # the moments are of the row
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    scales = ask_columns(scale, columns, WIDTH, 2 if GATE else 1)
    biases = ask_columns(bias, columns, WIDTH, 2 if GATE else 1)
    lines, places, moments, squares, totals = tl.tuple(()), tl.tuple(()), tl.tuple(()), tl.tuple(()), tl.tuple(())
    for line in tl.static_range(LINES):
        column = tl.minimum(tl.program_id(0) * OUTPUTS + line % OUTPUTS, WIDTH - 1)
        lines += (weight + (column + line // OUTPUTS * WIDTH).to(tl.int64) * K,)
    for row in tl.static_range(ROWS):
        places += (x + tl.minimum(row, rows - 1).to(tl.int64) * K,)
        moments += _moments(places[row], K, DEPTH, EPSILON) if NORM == "layer" else (0.0, 1.0)
        squares += (tl.zeros([LENGTH], tl.float32),)
        for _ in tl.static_range(LINES):
            totals += (tl.zeros([LENGTH], tl.float32),)
    for start in range(0, K, DEPTH * UNROLL):
        weights, gains = _ask(lines, norm_weight, start, K, DEPTH, UNROLL)
        wait_for_last(EARLY)
        let_next_begin(EARLY)
        # To save registers the compiler moves loads down to where they are used, but not over a barrier: all weights
        # are on their way before the rows are, which come from the cache, and the first sum waits for both.
        tl.debug_barrier()
        new_squares, new_totals = tl.tuple(()), tl.tuple(())
        for row in tl.static_range(ROWS):
            square, sums = _add(
                places[row], moments[2 * row : 2 * row + 2], squares[row], totals[row * LINES : (row + 1) * LINES],
                weights, gains, norm_bias, start, K, NORM, DEPTH, UNROLL,
            )  # fmt: skip
            new_squares += (square,)
            new_totals += sums
        squares, totals = new_squares, new_totals
    for row in tl.static_range(ROWS):
        factor = _inverse_root(tl.sum(squares[row], 0) / K + EPSILON) if NORM == "rms" else 1.0
        mine = totals[row * LINES : (row + 1) * LINES]
        value = activate(_finished(mine[:OUTPUTS], factor, scales, biases, 0, OUTPUTS, LENGTH), ACTIVATION)
        if GATE:
            value *= _finished(mine[OUTPUTS:], factor, scales, biases, 1, OUTPUTS, LENGTH)
        place = tl.minimum(row, rows - 1).to(tl.int64) * WIDTH + columns
        inside = (columns < WIDTH) & (row < rows)
        if residual is not None:
            value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)
