"""How a step of several sequences is cut into parts that have a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.runtime.cuda.parts import MOST_PIECES, parts_of
from engine.runtime.cuda.step import Int32, PackedStep

AXES = 3


def numbers(values: Sequence[int]) -> Int32:
    return np.array(values, np.int32)


def step(
    counts: Sequence[int], sampled: Sequence[int], images: Sequence[int] = (), *, mutual: bool = False
) -> PackedStep:
    """The sequences `sampled` choose a token, for slots 10, 11, ...; those of `images` begin with one of its rows."""
    total, ends = sum(counts), np.cumsum(counts)
    index = np.full(total, -1, np.int32)
    index[(ends - counts)[list(images)]] = 7
    return PackedStep(
        ids=np.arange(total, dtype=np.int32),
        positions=np.arange(total, dtype=np.int32) + np.zeros((AXES, 1), np.int32),
        counts=numbers(counts),
        past=numbers([100 + number for number in range(len(counts))]),
        tables=np.arange(len(counts), dtype=np.int32)[:, None],
        logits_rows=numbers([int(ends[sequence]) - 1 for sequence in sampled]),
        slots=numbers([10 + place for place in range(len(sampled))]),
        features=torch.zeros((8, 4)) if images else None,
        feature_index=index if images else None,
        mutual=mutual,
    )


def told(whole: PackedStep) -> list[tuple[list[int], list[int], list[int], list[int], int]]:
    """Of each part its counts, first sequence's tables, logits' rows, slots, and where those are in the step."""
    parts = parts_of(whole, lambda part: len(part.ids) < 50)
    for part, _ in parts:
        assert part.positions.shape == (AXES, len(part.ids))
        assert part.past.tolist() == [100 + int(number) for number in part.tables[:, 0]]
        assert len(part.ids) == part.counts.sum()
    return [
        (one.counts.tolist(), one.tables[:, 0].tolist(), one.logits_rows.tolist(), one.slots.tolist(), first)
        for one, first in parts
    ]


def test_what_decodes_is_a_part_and_each_prompt_is_one() -> None:
    assert told(step([1, 9, 1, 30], [0, 1, 2])) == [], "logits of a piece between those that decode"
    assert told(step([1, 1, 9, 30], [0, 1, 2])) == [
        ([1, 1], [0, 1], [0, 1], [10, 11], 0),
        ([9], [2], [8], [12], 2),
        ([30], [3], [], [], 0),
    ]
    assert told(step([9, 30, 1, 1], [1, 2, 3])) == [
        ([1, 1], [2, 3], [0, 1], [11, 12], 1),
        ([9], [0], [], [], 0),
        ([30], [1], [29], [10], 0),
    ]
    assert told(step([9, 30], [0, 1])) == [([9], [0], [8], [10], 0), ([30], [1], [29], [11], 1)]


def test_tokens_and_features_are_those_of_the_sequences() -> None:
    lone = step([1, 1, 5], [0, 1], images=[1])
    assert [len(part.step.counts) for part in parts_of(lone, lambda part: True)] == [1, 1, 1], "a lone image token"
    whole = step([1, 1, 5, 4], [0, 1], images=[2])
    decoding, image, text = (part.step for part in parts_of(whole, lambda part: True))
    assert decoding.is_decode
    assert (decoding.ids.tolist(), image.ids.tolist(), text.ids.tolist()) == ([0, 1], [2, 3, 4, 5, 6], [7, 8, 9, 10])
    assert image.features is whole.features
    assert image.feature_index is not None
    assert image.feature_index.tolist() == [7, -1, -1, -1, -1]
    assert text.features is None
    assert text.feature_index is None


@pytest.mark.parametrize(
    "whole",
    [
        step([1, 1, 1], [0, 1, 2]),  # a decode step has a graph of its own
        step([30], [0]),  # and so does a piece
        step([1, 60], [0, 1]),  # without a graph
        step([2] * (MOST_PIECES + 1), []),
        step([1, 9], [0, 1], mutual=True),
        step([9, 9], [1, 0]),
    ],
    ids=["decode", "piece", "long", "many", "mutual", "order"],
)
def test_other_steps_stay_whole(whole: PackedStep) -> None:
    assert parts_of(whole, lambda part: len(part.ids) < 50) == []


def test_as_many_pieces_as_are_worth_it() -> None:
    assert len(parts_of(step([1, *[2] * MOST_PIECES], [0]), lambda part: True)) == MOST_PIECES + 1
