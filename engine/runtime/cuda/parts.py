"""A step of several sequences, cut into parts that run from captured graphs one after another.

A step that decodes and reads prompts runs operator by operator, for which the host takes 13 ms and more where the
operators are ours; the graphs of its parts take the device 2 ms for the decoding rows and 4 to 11 for a piece of a
prompt, though each reads the weights anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from engine.runtime.cuda.step import Int32, PackedStep

MOST_PIECES = 4  # of prompts in a step; more are faster together


class StepPart(NamedTuple):
    """`first` is the row of its first logits among those of the whole step; the others follow."""

    step: PackedStep
    first: int


def parts_of(step: PackedStep, is_captured_piece: Callable[[PackedStep], bool]) -> list[StepPart]:
    """The sequences that decode as one decode step, and each other one by itself; empty where that does not pay or a
    part has no graph.
    """
    ends = np.cumsum(step.counts, dtype=np.int32)
    chosen = np.searchsorted(ends, step.logits_rows, side="right").astype(np.int32)  # the sequences of the logits
    in_order = bool((np.diff(chosen) > 0).all())
    if step.mutual or not in_order or not np.array_equal(step.logits_rows, ends[chosen] - 1):
        return []
    decodes = np.isin(np.arange(len(ends)), chosen) & (step.counts == 1)
    if step.feature_index is not None:
        decodes &= step.feature_index[ends - 1] < 0
    pieces = np.flatnonzero(~decodes)
    if not 0 < len(pieces) <= MOST_PIECES or len(ends) == 1:
        return []
    sequences = [np.array([piece]) for piece in pieces]
    if decodes.any():
        sequences.insert(0, np.flatnonzero(decodes))
    parts = [_part(step, ends, chosen, one) for one in sequences]
    follow = all(np.array_equal(part.step.slots, step.slots[part.first :][: len(part.step.slots)]) for part in parts)
    fits = all(part.step.is_decode or is_captured_piece(part.step) for part in parts)
    return parts if follow and fits else []


def _part(step: PackedStep, ends: Int32, chosen: Int32, sequences: Int32) -> StepPart:
    counts = step.counts[sequences]
    tokens = np.concatenate([np.arange(end - count, end) for end, count in zip(ends[sequences], counts, strict=True)])
    rows = np.flatnonzero(np.isin(chosen, sequences))
    index = None if step.feature_index is None else step.feature_index[tokens]
    shown = index is not None and bool((index >= 0).any())
    part = replace(
        step,
        ids=step.ids[tokens],
        positions=step.positions[:, tokens],
        counts=counts,
        past=step.past[sequences],
        tables=step.tables[sequences],
        logits_rows=(np.cumsum(counts, dtype=np.int32) - 1)[np.isin(sequences, chosen)],
        slots=step.slots[rows],
        features=step.features if shown else None,
        feature_index=index if shown else None,
    )
    return StepPart(part, int(rows[0]) if len(rows) else 0)
