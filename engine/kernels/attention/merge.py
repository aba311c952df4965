"""Putting a sequence's splits together: each has a mean of values for each head, and how much that mean weighs."""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def leave(
    scratch: tl.tensor,
    units: tl.tensor,
    unit: tl.tensor,
    peak: tl.tensor,
    mass: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    channel: tl.tensor,
    KEPT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> None:
    """Write a split's means total / mass [R, D] and levels (log2 of its mass, peak included) [R] of its first `count`
    rows to its place in scratch.

    scratch float32: means [units, KEPT, HEAD_DIM], then levels [units, KEPT].
    """
    rows = tl.arange(0, total.shape[0])
    means = scratch + (unit * KEPT + rows[:, None]) * HEAD_DIM + channel
    tl.store(means, total / mass[:, None], (rows[:, None] < count) & (channel < HEAD_DIM), cache_modifier=".cg")
    levels = scratch + units * (KEPT * HEAD_DIM) + unit * KEPT + rows
    tl.store(levels, peak + tl.log2(mass), mask=rows < count, cache_modifier=".cg")


@triton.jit
def merged_rows(KEPT: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """Of each value that `merged` returns, its row: [KEPT * CHANNELS / WIDE, 1]."""
    return (tl.arange(0, KEPT * CHANNELS // WIDE) * WIDE // CHANNELS)[:, None]


@triton.jit
def merged_channels(KEPT: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr) -> tl.tensor:
    """Of each value that `merged` returns, its channel: [KEPT * CHANNELS / WIDE, WIDE]."""
    return (tl.arange(0, KEPT * CHANNELS // WIDE) * WIDE % CHANNELS)[:, None] + tl.arange(0, WIDE)[None, :]


@triton.jit
def merged(
    scratch: tl.tensor,
    units: tl.tensor,
    first: tl.tensor,
    splits: tl.tensor,
    KEPT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MERGED: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """The mean [KEPT * CHANNELS / WIDE, WIDE] of `splits` splits that were left from unit `first` on, in order;
    rows and channels that were not left come out as anything.

    MERGED of them are asked for at once. A thread has the same WIDE channels of all of them and reads for itself how
    much they weigh: nothing moves between threads, who would have to wait for each other. That holds if there is a
    thread at most for each WIDE channels.
    """
    row, channel = merged_rows(KEPT, CHANNELS, WIDE), merged_channels(KEPT, CHANNELS, WIDE)
    inside = None if HEAD_DIM == CHANNELS else channel < HEAD_DIM
    level = tl.full(row.shape, -float("inf"), tl.float32)
    mass = tl.zeros(row.shape, tl.float32)
    total = tl.zeros(channel.shape, tl.float32)
    start = splits * 0
    while start < splits:
        levels, means = tl.tuple(()), tl.tuple(())
        for number in tl.static_range(MERGED):  # the last one instead of none, weighing nothing: cheaper than zeros
            unit = first + tl.minimum(start + number, splits - 1)
            levels += (tl.load(scratch + units * (KEPT * HEAD_DIM) + unit * KEPT + row, cache_modifier=".cg"),)
            place = scratch + unit * (KEPT * HEAD_DIM) + row * HEAD_DIM + channel
            means += (tl.load(place, mask=inside, cache_modifier=".cg"),)
        higher = level
        for number in tl.static_range(MERGED):
            higher = tl.maximum(higher, levels[number])
        older = tl.exp2(level - higher)
        mass, total = mass * older, total * older
        for number in tl.static_range(MERGED):
            weight = tl.where(start + number < splits, tl.exp2(levels[number] - higher), 0.0)
            mass += weight
            total += means[number] * weight
        start, level = start + MERGED, higher
    return total / mass
