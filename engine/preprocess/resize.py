"""Resizing as torch does it with 8-bit images, to the bit.

Video processors of transformers resize tensors with torch's antialiased `interpolate` (ATen's
native/cpu/UpSampleKernel.cpp), which works as Pillow does, with coarser weights: 16-bit integers, as fine as the
largest of them allows, summed exactly and rounded after each direction, columns first.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WEIGHT_LIMIT = 1 << 15
_MAX_SHIFT = 22
_EXACT = 1 << 24  # float32 adds integers below this without an error, in any order
_BLOCK = 32  # outputs of one product: of few, products are small; of many, most of their weights are zero
# Multiplications of one product. OpenBLAS shares larger ones out among threads, which wait for each other: beside
# whatever else computes that takes ten times as long.
_PRODUCT = 1 << 18


def resize_bicubic(planes: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """[channels, h, w] to [channels, height, width]."""
    if planes.shape[2] != width:
        planes = np.ascontiguousarray(planes)
        planes = _resized(planes.reshape(-1, planes.shape[2]), width).reshape(*planes.shape[:2], width)
    if planes.shape[1] != height:
        channels, rows, columns = planes.shape
        lines = planes.transpose(0, 2, 1).reshape(-1, rows)
        planes = _resized(lines, height).reshape(channels, columns, height).transpose(0, 2, 1)
    return np.ascontiguousarray(planes)


@dataclass(frozen=True, slots=True, eq=False)
class _Filter:
    """Blocks of outputs (start, stop), each with the inputs (first, last) and their weights [inputs, outputs]."""

    blocks: tuple[tuple[slice, slice, NDArray[Any]], ...]
    shift: int
    dtype: type[np.floating]


def _resized(lines: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
    """[lines, n] to [lines, length]."""
    wanted = _filter(lines.shape[1], length)
    values = lines.astype(wanted.dtype)
    sums = np.empty((len(lines), length), wanted.dtype)
    for outputs, inputs, weights in wanted.blocks:
        count = max(1, _PRODUCT // weights.size)
        for start in range(0, len(lines), count):
            some = slice(start, start + count)
            np.matmul(values[some, inputs], weights, out=sums[some, outputs])
    sums += wanted.dtype(1 << (wanted.shift - 1))
    sums *= wanted.dtype(2.0**-wanted.shift)
    np.floor(sums, out=sums)
    return np.clip(sums, 0, 255, out=sums).astype(np.uint8)


@functools.lru_cache(64)
def _filter(inputs: int, outputs: int) -> _Filter:
    weights, shift = _weights(inputs, outputs)
    largest = 255 * int(np.abs(weights).sum(axis=0).max()) + (1 << shift)
    dtype = np.float32 if largest < _EXACT else np.float64
    blocks = []
    for start in range(0, outputs, _BLOCK):
        part = weights[:, start : start + _BLOCK]
        used = np.flatnonzero(part.any(axis=1))
        reach = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((slice(start, start + part.shape[1]), reach, part[reach].astype(dtype)))
    return _Filter(tuple(blocks), shift, dtype)


def _weights(inputs: int, outputs: int) -> tuple[NDArray[np.int64], int]:
    """Integers [inputs, outputs], and by how many bits their sums are shifted."""
    scale = inputs / outputs
    support = 2.0 * max(scale, 1.0)
    weights = np.zeros((inputs, outputs))
    for place in range(outputs):
        center = scale * (place + 0.5)
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), inputs)
        taps = [_bicubic((tap - center + 0.5) / max(scale, 1.0)) for tap in range(first, last)]
        weights[first:last, place] = np.array(taps) / math.fsum(taps)
    shift, largest = 0, float(weights.max())
    while shift < _MAX_SHIFT and int(0.5 + largest * (1 << (shift + 1))) < _WEIGHT_LIMIT:
        shift += 1
    scaled = weights * (1 << shift)
    return np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64), shift


def _bicubic(x: float) -> float:
    """Keys' kernel with a = -0.5, which torch and Pillow use where they smooth."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0
