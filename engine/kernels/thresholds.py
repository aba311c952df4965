"""The limit at which a filter cuts a row, exact to the bit and with all ties: by bisection over the ordered keys.

A limit keeps the tokens whose key (see engine/kernels/sampling.py) is not above it. Weights are 1 for top-k, masses for
top-p.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.rows import CHUNK, INFINITE, key, read


@triton.jit
def smallest_limit(keys: tl.tensor, weights: tl.tensor, goal: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The smallest limit above low whose weight (that of the keys up to it) reaches goal; high if none below does."""
    while high - low > 1:
        middle = low + (high - low) // 2
        if tl.sum(tl.where(keys <= middle, weights, 0.0), 0) >= goal:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def _collect(
    row: tl.tuple,
    peak: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    few: tl.tensor,
    VOCAB: tl.constexpr,
    ROOM: tl.constexpr,
) -> tl.tensor:
    """Write to few [ROOM] the d of the row whose keys are above low and up to high; how many there are, fit or not."""
    size = tl.full([], 0, tl.int32)
    for chunk in range(triton.cdiv(VOCAB, CHUNK)):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        d = (peak - read(row, columns, columns < VOCAB)) * scale
        within = (key(d) > low) & (key(d) <= high) & (columns < VOCAB)
        place = size + tl.cumsum(within.to(tl.int32), 0) - 1
        tl.store(few + place, d, mask=within & (place < ROOM))
        size += tl.sum(within.to(tl.int32), 0)
    tl.debug_barrier()
    return size


@triton.jit
def _narrow(
    row: tl.tuple,
    peak: tl.tensor,
    scale: tl.tensor,
    goal: tl.tensor,
    by_count: tl.tensor,
    low: tl.tensor,
    below: tl.tensor,
    high: tl.tensor,
    above: tl.tensor,
    VOCAB: tl.constexpr,
) -> tl.tensor:
    """One pass over the row that halves the range of keys at least, to an eighth where the weight is smooth.

    It tries the interpolated limit from both sides and the middle, and draws the range in to the keys that are there.
    """
    width = high - low
    part = tl.minimum(tl.maximum((goal - below) / tl.maximum(above - below, 1e-30), 0.0), 1.0)
    aim = low + (part * width.to(tl.float32)).to(tl.int32)
    left = tl.minimum(tl.maximum(aim - width // 16, low + 1), high - 1)
    right = tl.maximum(tl.minimum(tl.maximum(aim, low + 1) + width // 16, high - 1), left)
    middle = low + width // 2
    left_sum = tl.zeros([CHUNK], tl.float32)
    right_sum = tl.zeros([CHUNK], tl.float32)
    middle_sum = tl.zeros([CHUNK], tl.float32)
    least = tl.full([CHUNK], INFINITE, tl.int32)
    most = tl.full([CHUNK], -1, tl.int32)
    for chunk in range(triton.cdiv(VOCAB, CHUNK)):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        d = (peak - read(row, columns, columns < VOCAB)) * scale
        keys = key(d)
        weights = tl.where(by_count, tl.where(columns < VOCAB, 1.0, 0.0), tl.exp2(-d))
        left_sum += tl.where(keys <= left, weights, 0.0)
        right_sum += tl.where(keys <= right, weights, 0.0)
        middle_sum += tl.where(keys <= middle, weights, 0.0)
        within = (keys > low) & (keys <= high)
        least = tl.where(within, tl.minimum(least, keys), least)
        most = tl.where(within, tl.maximum(most, keys), most)
    bottom, top = tl.min(least, 0), tl.max(most, 0)
    for attempt in tl.static_range(3):
        if attempt == 0:
            limit, weight = left, tl.sum(left_sum, 0)
        elif attempt == 1:
            limit, weight = right, tl.sum(right_sum, 0)
        else:
            limit, weight = middle, tl.sum(middle_sum, 0)
        if weight >= goal:
            if limit < high:
                high, above = limit, weight
        elif limit > low:
            low, below = limit, weight
    return tl.maximum(low, bottom - 1), below, tl.where(top >= 0, tl.minimum(high, top), high), above


@triton.jit
def row_limit(
    row: tl.tuple,
    few: tl.tensor,
    peak: tl.tensor,
    scale: tl.tensor,
    goal: tl.tensor,
    by_count: tl.tensor,
    low: tl.tensor,
    below: tl.tensor,
    high: tl.tensor,
    above: tl.tensor,
    VOCAB: tl.constexpr,
    ROOM: tl.constexpr,
) -> tl.tensor:
    """As `smallest_limit` over the whole row, where `low` is known to weigh `below` < goal, and `high` about `above`.

    The range of keys is narrowed until what it holds fits in few [ROOM]: none of it weighs less than its last key, so
    above - below bounds the number. Rounding may break the bound; then the range is narrowed to the end.
    """
    fits = True
    while high - low > 1:
        least = tl.where(by_count, 1.0, tl.exp2(-high.to(tl.float32, bitcast=True)))
        if fits & (above - below <= ROOM * least):
            size = _collect(row, peak, scale, low, high, few, VOCAB, ROOM)
            fits = size <= ROOM
            if fits:
                place = tl.arange(0, ROOM)
                d = tl.load(few + place, mask=place < size, other=float("inf"))
                weights = tl.where(by_count, tl.where(place < size, 1.0, 0.0), tl.exp2(-d))
                high = smallest_limit(key(d), weights, goal - below, low, high)
                low = high - 1
        else:
            low, below, high, above = _narrow(row, peak, scale, goal, by_count, low, below, high, above, VOCAB)
    return high
