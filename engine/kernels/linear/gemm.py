"""Many rows times an int8 matrix, on tensor cores: int8 rows with a scale each, or 16-bit rows as they are.

The weight is the left operand: its tile is read along K as it lies in memory, and where the rows are 16-bit, it is
widened in registers, which only the left operand of Hopper's instruction may be in.

A narrow product has fewer tiles than the device has multiprocessors, so SPLITS programs share a tile's depth. Each
leaves its part in scratch memory and takes a ticket; whoever takes the last one adds the parts up, in the order of the
depth whoever it is, and resets the ticket. A second kernel would add as much and cost another launch, about a
microsecond beside the two to eight of such a product. Parts of int8 rows are integers, exact in any tile and any split.

Many rows keep the tensor cores busy, and threads that compute addresses and copy 16 bytes each would not keep up: BULK,
the device's copy engine brings whole tiles of both operands (2,048 rows on an H100: 1.65 times as fast).

The first weights of a program are asked for before it waits for its rows, and lie in registers while the rest is
multiplied: the launch that quantises the rows takes as long as memory takes for all weights of a narrow product.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from engine.kernels.activation import activate
from engine.kernels.compiled import keyed
from engine.kernels.linear.epilogue import EARLY_SUMS, EARLY_TOKENS, ask_columns, read_residual, scaled
from engine.kernels.overlap import BESIDE as _BESIDE
from engine.kernels.overlap import let_next_begin, wait_for_last

GROUP = tl.constexpr(16)  # tiles of rows whose programs run side by side: they share the weights in L2
BESIDE = tl.constexpr(_BESIDE)
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))  # then bfloat16 is multiplied as the integers of its bits


@triton.jit
def _tile_of(program: tl.tensor, rows: tl.tensor, COLUMN_TILES: tl.constexpr, TOKENS: tl.constexpr) -> tl.tuple:
    """(column tile, row tile), rows fastest within a group."""
    row_tiles = tl.cdiv(rows, TOKENS)
    group = program // (GROUP * COLUMN_TILES)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    place = program - group * GROUP * COLUMN_TILES
    return place // size, group * GROUP + place % size


@triton.jit
def _ask(
    weight: tl.tensor,
    outputs: tl.tensor,
    first: tl.tensor,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    DEPTH: tl.constexpr,
    MASKED: tl.constexpr,
    AHEAD: tl.constexpr,
) -> tl.tuple:
    """Weights of AHEAD steps from `first` on, as `_product` reads them."""
    k = tl.arange(0, DEPTH)
    tiles = weight + outputs.to(tl.int64)[:, None] * K + (first + k)[None, :]
    asked = tl.tuple(())
    for step in tl.static_range(AHEAD):
        inside = (k < K - first - step * DEPTH)[None, :]
        for part in tl.static_range(PARTS):
            asked += (_load(tiles + part * PART + step * DEPTH, inside, MASKED),)
    return asked


@triton.jit
def _product(
    x: tl.tensor,
    weight: tl.tensor,
    asked: tl.tuple,
    tokens: tl.tensor,
    outputs: tl.tensor,
    first: tl.tensor,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
    MASKED: tl.constexpr,
    AHEAD: tl.constexpr,
) -> tl.tuple:
    """Tiles [outputs, tokens] of weight @ x.T over STEPS * DEPTH from first on; with PARTS 2 another, PART weights on.

    MASKED: the last steps may reach past K. `asked` are the weights of the first AHEAD steps, which are added last.
    """
    TYPE: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros([outputs.shape[0], tokens.shape[0]], TYPE)
    upper = total
    k = tl.arange(0, DEPTH)
    values = x + tokens.to(tl.int64)[None, :] * K + (first + k)[:, None]
    tiles = weight + outputs.to(tl.int64)[:, None] * K + (first + k)[None, :]
    their_values = tl.tuple(())
    for step in tl.static_range(AHEAD):
        their_values += (_load(values + step * DEPTH, (k < K - first - step * DEPTH)[:, None], MASKED),)
    values += AHEAD * DEPTH
    tiles += AHEAD * DEPTH
    for step in range(AHEAD, STEPS):
        inside = k < K - first - step * DEPTH
        value = _load(values, inside[:, None], MASKED)
        total = _accumulate(_load(tiles, inside[None, :], MASKED), value, total)
        if PARTS == 2:
            upper = _accumulate(_load(tiles + PART, inside[None, :], MASKED), value, upper)
        values += DEPTH
        tiles += DEPTH
    for step in tl.static_range(AHEAD):
        total = _accumulate(asked[step * PARTS], their_values[step], total)
        if PARTS == 2:
            upper = _accumulate(asked[step * PARTS + 1], their_values[step], upper)
    return total, upper


@triton.jit
def _copied_product(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    token: tl.tensor,
    output: tl.tensor,
    first: tl.tensor,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
) -> tl.tuple:
    """As `_product`, of int8 tiles that the copy engine brings; the other one is WIDTH outputs on."""
    total = tl.zeros([OUTPUTS, TOKENS], tl.int32)
    upper = total
    for step in range(STEPS):
        k = first + step * DEPTH
        value = x.load([token, k]).T
        total = tl.dot(weight.load([output, k]), value, total, out_dtype=tl.int32)
        if PARTS == 2:
            upper = tl.dot(weight.load([output + WIDTH, k]), value, upper, out_dtype=tl.int32)
    return total, upper


@triton.jit
def _load(places: tl.tensor, inside: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    return tl.load(places, mask=inside, other=0) if MASKED else tl.load(places)


@triton.jit
def _accumulate(tile: tl.tensor, value: tl.tensor, total: tl.tensor) -> tl.tensor:
    if INTERPRETED and value.dtype == tl.bfloat16:
        value = value.to(tl.float32)
    return tl.dot(tile.to(value.dtype), value, total, out_dtype=total.dtype)


@triton.jit
def _summed(parts: tl.tensor, places: tl.tensor, STRIDE: tl.constexpr, SPLITS: tl.constexpr) -> tl.tensor:
    """The parts of a tile, added in the order of the depth. Read from L2, where other multiprocessors left them."""
    total = tl.load(parts + places, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * STRIDE + places, cache_modifier=".cg")
    return total


@triton.jit
def _finish(
    total: tl.tensor,
    upper: tl.tensor,
    row_scale: tl.tensor,
    factor: tl.tensor,
    scale: tl.tensor,
    scales: tl.tuple,
    bias: tl.tensor,
    biases: tl.tuple,
    residual: tl.tensor,
    added: tl.tensor,
    y: tl.tensor,
    columns: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> None:
    """factor, scales, biases and added are what row_scale, scale, bias and residual have here; read now if they were
    not asked for.
    """
    if len(scales) == 0:
        scales, biases = ask_columns(scale, columns, WIDTH, PARTS), ask_columns(bias, columns, WIDTH, PARTS)
        if row_scale is not None:
            factor = tl.load(row_scale + tokens, mask=tokens < rows, other=0.0)
    if factor is not None:
        total, upper = total.to(tl.float32) * factor[None, :], upper.to(tl.float32) * factor[None, :]
    value = activate(scaled(total, scales, biases, 0), ACTIVATION)
    if ACTIVATION == "silu_gate":
        value *= scaled(upper, scales, biases, 1)
    if residual is not None:
        if added is None:
            added = read_residual(residual, columns, tokens, rows, WIDTH)
        value += added.to(tl.float32)
    places = tokens.to(tl.int64)[None, :] * WIDTH + columns[:, None]
    inside = (tokens < rows)[None, :] & (columns < WIDTH)[:, None]
    tl.store(y + places, value.to(y.dtype.element_ty), mask=inside)


@keyed
@triton.jit(do_not_specialize=["rows"])
def gemm(
    x: tl.tensor,
    row_scale: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    parts: tl.tensor,
    tickets: tl.tensor,
    rows: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr = 0,
    BULK: tl.constexpr = False,
    EARLY: tl.constexpr = False,
) -> None:
    """y [rows, WIDTH] = activation(x @ weight.T * scale * row_scale + bias) + residual; program (tile, split).

    x [rows, K] int8 with row_scale float32 [rows], or float16 or bfloat16 with None; weight int8 [N, K]; scale float32
    [N]; bias [N], residual and y as x or, where that is int8, float16 or bfloat16; what is not there is None. WIDTH is
    N, or N / 2 with silu_gate. parts: int32 or float32 [tiles, SPLITS, 1 or 2, OUTPUTS * TOKENS]; tickets int32
    [tiles], 0 before and after; both are None where SPLITS is 1. AHEAD: steps, as `_product` says. BULK: x, int8, and
    weight are descriptors of tiles [TOKENS, DEPTH] and [OUTPUTS, DEPTH].
    """
    PARTS: tl.constexpr = 2 if ACTIVATION == "silu_gate" else 1
    WIDTH: tl.constexpr = N // PARTS
    STEPS: tl.constexpr = triton.cdiv(triton.cdiv(K, DEPTH), SPLITS)
    TILE: tl.constexpr = OUTPUTS * TOKENS
    tile, split = tl.program_id(0), tl.program_id(1)
    column_tile, row_tile = _tile_of(tile, rows, triton.cdiv(WIDTH, OUTPUTS), TOKENS)
    columns = column_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    tokens = row_tile * TOKENS + tl.arange(0, TOKENS)
    near_tokens, near_columns = tl.minimum(tokens, rows - 1), tl.minimum(columns, WIDTH - 1)  # no masks but along K
    first = split * (STEPS * DEPTH)
    MASKED: tl.constexpr = K != SPLITS * STEPS * DEPTH
    asked = tl.tuple(())
    if AHEAD > 0:
        asked = _ask(weight, near_columns, first, K, PARTS, WIDTH * K, DEPTH, MASKED, AHEAD)
    scales, biases = tl.tuple(()), tl.tuple(())
    ASKED: tl.constexpr = PARTS * TILE <= EARLY_SUMS and not BULK
    if ASKED:
        scales, biases = ask_columns(scale, columns, WIDTH, PARTS), ask_columns(bias, columns, WIDTH, PARTS)
    wait_for_last(EARLY)
    if rows <= BESIDE or residual is not None or ACTIVATION == "silu_gate":  # what follows those is few programs
        let_next_begin(EARLY)
    if AHEAD > 0:
        tl.debug_barrier()  # over which the compiler moves no load
    factor, added = None, None
    if ASKED and (row_scale is not None):
        factor = tl.load(row_scale + near_tokens)
    if (residual is not None) and (TOKENS <= EARLY_TOKENS):
        added = read_residual(residual, columns, tokens, rows, WIDTH)
    if BULK:
        total, upper = _copied_product(
            x, weight, row_tile * TOKENS, column_tile * OUTPUTS, first, OUTPUTS, TOKENS, PARTS, WIDTH, DEPTH, STEPS
        )
    else:
        total, upper = _product(
            x, weight, asked, near_tokens, near_columns, first, K, PARTS, WIDTH * K, DEPTH, STEPS, MASKED, AHEAD
        )
    if SPLITS == 1:
        _finish(
            total, upper, row_scale, factor, scale, scales, bias, biases, residual, added, y,
            columns, tokens, rows, WIDTH, PARTS, ACTIVATION,
        )  # fmt: skip
    else:
        places = tl.arange(0, OUTPUTS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        parts += tile * (SPLITS * PARTS * TILE)
        tl.store(parts + split * (PARTS * TILE) + places, total)
        if PARTS == 2:
            tl.store(parts + split * (PARTS * TILE) + TILE + places, upper)
        tl.debug_barrier()  # every thread's part is written before one of them takes the ticket
        if tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(tickets + tile, 0)
            total = _summed(parts, places, PARTS * TILE, SPLITS)
            if PARTS == 2:
                upper = _summed(parts + TILE, places, PARTS * TILE, SPLITS)
            _finish(
                total, upper, row_scale, factor, scale, scales, bias, biases, residual, added, y,
                columns, tokens, rows, WIDTH, PARTS, ACTIVATION,
            )  # fmt: skip
