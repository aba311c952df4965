"""Putting a sequence's splits together: each has a maximum, a mass and a sum of values for each head."""

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
    """Write a split's peaks (log2), masses [R] and sums [R, D] of its first `count` rows to its place in scratch.

    scratch float32: sums [units, KEPT, HEAD_DIM], then peaks and masses [units, 2, KEPT].
    """
    rows = tl.arange(0, total.shape[0])
    sums = scratch + (unit * KEPT + rows[:, None]) * HEAD_DIM + channel
    tl.store(sums, total, mask=(rows[:, None] < count) & (channel < HEAD_DIM), cache_modifier=".cg")
    pairs = scratch + units * (KEPT * HEAD_DIM) + unit * (2 * KEPT) + rows
    tl.store(pairs, peak, mask=rows < count, cache_modifier=".cg")
    tl.store(pairs + KEPT, mass, mask=rows < count, cache_modifier=".cg")


@triton.jit
def merged(
    scratch: tl.tensor,
    units: tl.tensor,
    first: tl.tensor,
    splits: tl.tensor,
    count: tl.tensor,
    KEPT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MERGED: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """The mean [KEPT, CHANNELS] of `splits` splits that were left from unit `first` on, MERGED at a time, in order."""
    rows = tl.arange(0, KEPT)
    channel = tl.arange(0, CHANNELS)
    inside = (rows[:, None] < count) & (channel[None, :] < HEAD_DIM)
    peak = tl.full([KEPT], -float("inf"), tl.float32)
    mass = tl.zeros([KEPT], tl.float32)
    total = tl.zeros([KEPT, CHANNELS], tl.float32)
    start = splits * 0
    while start < splits:
        split = start + tl.arange(0, MERGED)
        unit = first + split
        here = (split[:, None] < splits) & (rows[None, :] < count)
        pairs = scratch + units * (KEPT * HEAD_DIM) + unit[:, None] * (2 * KEPT) + rows[None, :]
        peaks = tl.load(pairs, mask=here, other=-float("inf"), cache_modifier=".cg")
        masses = tl.load(pairs + KEPT, mask=here, other=0.0, cache_modifier=".cg")
        sums = scratch + (unit[:, None, None] * KEPT + rows[None, :, None]) * HEAD_DIM + channel[None, None, :]
        parts = tl.load(sums, mask=here[:, :, None] & inside[None, :, :], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(peaks, 0))
        higher = tl.where(rows < count, higher, 0.0)
        weights = tl.exp2(peaks - higher[None, :])
        older = tl.exp2(peak - higher)
        mass = mass * older + tl.sum(masses * weights, 0)
        total = total * older[:, None] + tl.sum(parts * weights[:, :, None], 0)
        start, peak = start + MERGED, higher
    return total / tl.where(rows < count, mass, 1.0)[:, None]
