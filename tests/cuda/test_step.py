"""Inputs of a packed call on their way to the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.runtime.cuda.step import PackedStep, StepBuffer

CPU = torch.device("cpu")


def packed(counts: list[int], past: list[int], sampled: int, features: torch.Tensor | None = None) -> PackedStep:
    tokens = sum(counts)
    zeros = np.zeros(tokens, np.int32)
    rows = np.zeros(sampled, np.int32)
    tables = np.zeros((len(counts), 1), np.int32)
    return PackedStep(zeros, zeros[None], np.array(counts), np.array(past), tables, rows, rows, features)


def test_parts_lie_apart_and_begin_at_16_bytes() -> None:
    place = StepBuffer(64, CPU).place({"a": (3,), "none": (0,), "b": (2, 5), "c": (4,)})
    assert place.starts == {"a": 0, "none": 4, "b": 4, "c": 16}
    assert place.size == 20


def test_what_is_uploaded_is_what_the_views_show() -> None:
    place = StepBuffer(64, CPU).place({"a": (3,), "b": (2, 5)})
    parts = {"a": np.array([1, 2, 3], np.int32), "b": np.arange(10, dtype=np.int32).reshape(2, 5)}
    place.upload(parts)
    for name, part in parts.items():
        assert place.view(name).tolist() == part.tolist()
        assert place.view(name).is_contiguous()


def test_a_part_that_is_smaller_than_its_place_is_followed_by_zeros() -> None:
    place = StepBuffer(64, CPU).place({"a": (3,), "b": (2, 3)})
    for _ in range(4):  # so that every buffer of the ring has something to be cleared of
        place.upload({"a": np.full(3, 7, np.int32), "b": np.full((2, 3), 7, np.int32)})
    place.upload({"a": np.array([1], np.int32), "b": np.array([[1, 2]], np.int32)})
    assert place.view("a").tolist() == [1, 0, 0]
    assert place.view("b").tolist() == [[1, 2, 0], [0, 0, 0]]


def test_views_stay_where_they_are_and_show_the_newest_step() -> None:
    place = StepBuffer(16, CPU).place({"a": (3,)})
    view = place.view("a")
    for number in range(7):
        place.upload({"a": np.full(3, number, np.int32)})
        assert view.tolist() == [number] * 3
    assert view.data_ptr() == place.view("a").data_ptr()


def test_a_host_buffer_is_left_alone_while_the_next_step_is_built() -> None:
    """Its copy may not have begun."""
    buffer = StepBuffer(16, CPU)
    places = [buffer.place({"a": (4,)}), buffer.place({"a": (2,)})]
    used = []
    for number in range(6):
        places[number % 2].upload({"a": np.full(2, number, np.int32)})
        used.append(buffer.turn)
    assert all(len(set(used[start : start + 3])) == 3 for start in range(4))


def test_a_step_that_is_larger_than_the_buffer_is_an_error() -> None:
    with pytest.raises(ValueError, match="a step of 12 values"):
        StepBuffer(8, CPU).place({"a": (9,)})


@pytest.mark.parametrize(
    ("step", "decodes"),
    [
        (packed([1, 1], [5, 9], 2), True),
        (packed([1], [0], 1), True),  # a prompt of one token is a decode step like any other
        (packed([1, 2], [5, 9], 2), False),
        (packed([1, 1], [5, 9], 1), False),  # the end of a chunk that gives no token
        (packed([1, 1], [5, 9], 2, torch.zeros(1, 4)), False),
    ],
)
def test_one_token_for_each_is_a_decode_step(step: PackedStep, decodes: bool) -> None:
    assert step.is_decode == decodes


def test_the_longest_counts_its_new_tokens() -> None:
    assert packed([1, 7], [9, 4], 2).longest == 11


def test_an_upload_goes_on_where_it_is_told_to() -> None:
    place = StepBuffer(64, CPU).place({"past": (3,), "ids": (3,), "positions": (2, 3)})
    parts = {"past": [4, 9], "ids": [7, 8], "positions": [[4, 9], [5, 1]]}
    place.upload({name: np.array(part, np.int32) for name, part in parts.items()})
    increments = place.increments(["past", "positions"], 2)
    for number in range(1, 6):
        place.go_on(increments)
        assert place.view("past").tolist() == [4 + number, 9 + number, 0]
        assert place.view("ids").tolist() == [7, 8, 0]
        assert place.view("positions").tolist() == [[4 + number, 9 + number, 0], [5 + number, 1 + number, 0]]


def test_a_step_that_goes_on_is_the_next_one_of_its_sequences() -> None:
    step = packed([1, 1], [5, 9], 2)
    step.go_on(3)
    assert step.past.tolist() == [8, 12]
    assert step.positions.tolist() == [[3, 3]]
    assert step.longest == 13
