"""A list of calls that several threads empty together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.runners.shared_work import SharedWork


def test_results_are_in_the_order_of_the_items_whoever_was_first() -> None:
    second_is_done = threading.Event()

    def call(item: int) -> int:
        if item == 0:
            assert second_is_done.wait(10)
        elif item == 1:
            second_is_done.set()
        return item * item

    work = SharedWork(call, range(5))
    with ThreadPoolExecutor(2) as pool:
        for run in [pool.submit(work.run) for _ in range(2)]:
            run.result()
    assert work.results == [0, 1, 4, 9, 16]


def test_every_item_is_taken_once_by_however_many_threads() -> None:
    taken: list[int] = []
    work = SharedWork(taken.append, range(1000))
    with ThreadPoolExecutor(8) as pool:
        for run in [pool.submit(work.run) for _ in range(8)]:
            run.result()
    assert sorted(taken) == list(range(1000))


def test_a_call_that_raises_ends_its_own_run_only() -> None:
    def call(item: int) -> int:
        if item == 0:
            raise ValueError("this one")
        return item

    work = SharedWork(call, range(3))
    with pytest.raises(ValueError, match="this one"):
        work.run()
    work.run()
    assert work.results == [1, 2]


def test_nothing_to_do_is_done() -> None:
    work = SharedWork[int, str](str, [])
    work.run()
    assert work.results == []
