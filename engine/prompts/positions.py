"""Rotary positions of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int, int]


def text_positions(length: int, axes: int) -> NDArray[np.int64]:
    """int64 [axes, length]: every axis counts tokens."""
    return np.tile(np.arange(length, dtype=np.int64), (axes, 1))


class Block(NamedTuple):
    """Placeholders in one piece, from `start` on; `step` is how far its frames are apart on the temporal axis."""

    start: int
    grid: Grid  # (frames, rows, columns) of tokens
    step: int = 1


def mrope_positions(length: int, blocks: Sequence[Block]) -> tuple[NDArray[np.int64], int]:
    """Multimodal rotary positions, int64 [3, length], and the delta of what follows (Qwen2-VL, Wang et al. 2024, 2.1).

    Text counts on all three axes alike. An image or a video takes positions of time, row and column, and text goes on
    after the largest of row and column. The rule is `get_rope_index` of transformers 5.17,
    models/qwen2_vl/modeling_qwen2_vl.py.
    """
    pieces: list[NDArray[np.int64]] = []
    done = position = 0
    for start, grid, step in blocks:
        pieces.append(text_positions(start - done, 3) + position)
        position += start - done
        places = np.indices(grid, dtype=np.int64).reshape(3, -1)
        pieces.append(places * np.array([[step], [1], [1]]) + position)
        done = start + grid[0] * grid[1] * grid[2]
        position += max(grid[1], grid[2])
    pieces.append(text_positions(length - done, 3) + position)
    positions = np.concatenate(pieces, axis=1)
    return positions, int(positions.max(initial=-1)) + 1 - length
