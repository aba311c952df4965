"""When tokens become events: what somebody waits for at once, what can wait together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain
from typing import cast

import pytest

from engine import delivery
from engine.delivery import BUSY_JOBS, ChosenToken, Delivery
from engine.job import Job


class Taker:
    """What a delivery does to a job: the batches of tokens that it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.taken = threading.Event()

    def take(self, tokens: list[int], *, reused: int) -> None:
        self.batches.append(tokens)
        self.taken.set()


@pytest.fixture
def long_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is gathered stays so for the whole test."""
    monkeypatch.setattr(delivery, "PACE_S", 3600.0)


@pytest.fixture
def subject() -> Iterator[Delivery]:
    opened = Delivery("delivery")
    yield opened
    opened.close()


def step(jobs: list[Taker], token: int, *urgent: Taker) -> list[ChosenToken]:
    return [ChosenToken(cast(Job, job), token, 0, job in urgent) for job in jobs]


def many() -> list[Taker]:
    return [Taker() for _ in range(BUSY_JOBS + 1)]


def test_tokens_of_a_few_jobs_are_there_when_the_call_returns(subject: Delivery) -> None:
    jobs = [Taker() for _ in range(BUSY_JOBS)]
    subject.tokens(step(jobs, 1))
    subject.tokens(step(jobs, 2))
    assert [job.batches for job in jobs] == [[[1], [2]]] * BUSY_JOBS


@pytest.mark.usefixtures("long_pace")
def test_of_many_jobs_only_the_urgent_one_does_not_wait(subject: Delivery) -> None:
    jobs = many()
    subject.tokens(step(jobs, 1))
    assert all(job.taken.wait(10) for job in jobs)  # the pace begins with the first batch
    for job in jobs:
        job.taken.clear()
    subject.tokens(step(jobs, 2))
    subject.tokens(step(jobs, 3, jobs[0]))
    assert jobs[0].taken.wait(10)
    assert jobs[0].batches == [[1], [2, 3]]
    assert [job.batches for job in jobs[1:]] == [[[1]]] * BUSY_JOBS
    subject.close()
    assert [job.batches for job in jobs[1:]] == [[[1], [2, 3]]] * BUSY_JOBS


@pytest.mark.usefixtures("long_pace")
def test_work_comes_behind_the_urgent_tokens_before_it(subject: Delivery) -> None:
    jobs = many()
    subject.tokens(step(jobs, 1))
    assert all(job.taken.wait(10) for job in jobs)
    seen: list[list[list[int]]] = []
    done = threading.Event()
    subject.tokens(step(jobs, 2, jobs[0]))
    subject.work(lambda: seen.append(list(jobs[0].batches)))
    subject.work(done.set)
    subject.close()
    assert done.is_set()
    assert seen == [[[1], [2]]]


def test_gathered_tokens_are_delivered_once_their_time_has_come(subject: Delivery) -> None:
    jobs = many()
    for token in range(5):
        subject.tokens(step(jobs, token))
    subject.close()
    assert [list(chain(*job.batches)) for job in jobs] == [[0, 1, 2, 3, 4]] * len(jobs)
