"""What attention in plain operators has to be told about a step."""

from __future__ import annotations

import numpy as np

from engine.graphs.cuda import UnfusedInputs
from engine.runtime.cuda.step import Int32, PackedStep


def unfused_parts(step: PackedStep, columns: int, block_size: int) -> dict[str, Int32]:
    """`columns` of the step's tables are given to the graph."""
    counts, longest = step.counts, int(step.counts.max())
    row = np.repeat(np.arange(len(counts)), counts)
    order = np.arange(len(step.ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = step.past[row] + order
    unpadded = row * longest + order
    queries = np.zeros(len(counts) * longest, np.int32)
    queries[unpadded] = np.arange(len(step.ids))
    parts = {
        UnfusedInputs.PLACES: places,
        UnfusedInputs.WRITTEN: np.stack([step.tables[row, places // block_size], places % block_size], 1),
        UnfusedInputs.QUERIES: queries.reshape(len(counts), longest),
        UnfusedInputs.UNPADDED: unpadded,
        UnfusedInputs.LENGTHS: step.past + counts,
        UnfusedInputs.KEY_PLACES: np.arange(columns * block_size),
    }
    return {name: part.astype(np.int32) for name, part in parts.items()}


def unfused_size(step_tokens: int, slots: int, context_length: int) -> int:
    """int32 values that `unfused_parts` has at most, and what aligning each part may add."""
    return (4 + slots) * step_tokens + 2 * slots + 2 * context_length + 4096
