from __future__ import annotations

import logging
import threading

import pytest

from engine.cache.write_behind import WriteBehind


def test_jobs_run_in_order_on_another_thread() -> None:
    done: list[int] = []
    thread = WriteBehind("test")
    for number in range(100):
        assert thread.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    thread.submit(lambda: done.append(threading.get_ident()))
    assert thread.flush(5)
    assert done[:-1] == list(range(100))
    assert done[-1] != threading.get_ident()
    assert thread.close(5)


def test_a_full_queue_drops_and_never_blocks() -> None:
    gate = threading.Event()
    started = threading.Event()
    thread = WriteBehind("test", max_jobs=3, max_bytes=100)

    def hold() -> None:
        started.set()
        gate.wait(10)

    thread.submit(hold)
    started.wait(10)
    assert thread.submit(lambda: None, 1000), "an empty queue takes one job of any size"
    assert not thread.submit(lambda: None, 1)
    gate.set()
    assert thread.flush(5)
    gate.clear()
    started.clear()
    thread.submit(hold)
    started.wait(10)
    assert [thread.submit(lambda: None) for _ in range(5)] == [True, True, True, False, False]
    gate.set()
    assert thread.close(5)


def test_closing_finishes_what_is_queued_and_takes_nothing_more() -> None:
    done: list[int] = []
    thread = WriteBehind("test")
    for number in range(50):
        thread.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    assert thread.close(5)
    assert len(done) == 50
    assert not thread.submit(lambda: None)
    assert thread.close(5)


def test_closing_gives_up_after_its_time_limit() -> None:
    gate = threading.Event()
    done: list[int] = []
    thread = WriteBehind("test")

    def hold() -> None:
        gate.wait(10)

    thread.submit(hold)
    thread.submit(lambda: done.append(1))
    assert not thread.close(0.05)
    gate.set()
    assert thread.close(5)
    assert not done, "what was given up is not written later"


def test_a_job_that_raises_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    thread = WriteBehind("test")
    done: list[int] = []

    def fail() -> None:
        raise RuntimeError("broken")

    with caplog.at_level(logging.ERROR, "engine.cache"):
        thread.submit(fail)
        thread.submit(lambda: done.append(1))
        assert thread.flush(5)
    assert done == [1]
    assert "a write to the cache failed" in caplog.text
    thread.close(5)
