"""Rows' memory beside steps that are still under way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from engine.runners.ordered_memory import OrderedMemory
from engine.runners.step_thread import StepThread
from engine.runtime import Decoder


class Recorder:
    """A decoder that writes down what happens to its rows."""

    rows = 4

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def read_kv(self, row: int, start: int, stop: int) -> str:
        return f"{row}: {start} to {stop}"

    def write_kv(self, row: int, start: int, kv: Any) -> None:
        if kv is None:
            raise ValueError("nothing to write")
        self.calls.append(("write", row, start))

    def read_state(self, row: int) -> tuple[Any, ...]:
        return tuple(self.calls)

    def write_state(self, row: int, state: Any) -> None:
        self.calls.append(("state", row))

    def release(self, row: int) -> None:
        self.calls.append(("release", row))


KV = np.zeros((1, 1, 1, 16, 1), np.float32)


@pytest.fixture
def thread() -> Iterator[StepThread]:
    opened = StepThread("steps")
    yield opened
    opened.close()


@pytest.fixture
def decoder() -> Recorder:
    return Recorder()


@pytest.fixture
def memory(decoder: Recorder, thread: StepThread) -> OrderedMemory:
    return OrderedMemory(cast(Decoder, decoder), thread)


def test_changes_wait_for_the_steps_before_them_and_reading_does_not(
    decoder: Recorder, memory: OrderedMemory, thread: StepThread
) -> None:
    may_end = threading.Event()
    memory.place(0)

    def step() -> None:
        may_end.wait(10)
        decoder.calls.append(("step",))

    running = thread.submit(step)
    memory.release(0)
    memory.write_kv(1, 0, KV)
    assert cast(str, memory.read_kv(1, 0, 16)) == "0: 0 to 16"
    assert decoder.calls == []
    may_end.set()
    running.result()
    for change in memory.take_changes():
        change.result()
    assert decoder.calls == [("step",), ("release", 0), ("write", 0, 0)]
    assert memory.take_changes() == []


def test_a_state_is_read_after_everything_before(decoder: Recorder, memory: OrderedMemory) -> None:
    memory.write_state(2, np.zeros(1, np.float32))
    assert cast(Any, memory.read_state(2)) == (("state", 0),)


def test_rows_with_tokens_are_the_lowest_of_the_decoder(memory: OrderedMemory) -> None:
    assert [memory.place(row) for row in (3, 1, 2)] == [0, 1, 2]
    memory.release(3)
    assert memory.place(0) == 0
    assert memory.place(1) == 1


def test_a_row_that_never_had_tokens_is_not_the_decoders(decoder: Recorder, memory: OrderedMemory) -> None:
    memory.release(3)
    assert memory.take_changes() == []
    assert [memory.place(row) for row in range(4)] == [0, 1, 2, 3]


def test_a_change_that_fails_is_told_to_the_next_step(memory: OrderedMemory) -> None:
    memory.write_kv(0, 0, cast(Any, None))
    (change,) = memory.take_changes()
    with pytest.raises(ValueError, match="nothing to write"):
        change.result()


def test_a_thread_that_is_closed_has_done_what_it_was_given() -> None:
    thread, done = StepThread("steps"), threading.Event()
    thread.submit(done.set)
    thread.close()
    assert done.is_set()
