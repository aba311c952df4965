"""Tokens become text and events."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from engine.errors import EngineError
from engine.job import Job

logger = logging.getLogger(__name__)
BUSY_JOBS = 4  # with more of them their tokens are gathered: text costs the same for one token and for several
PACE_S = 0.02


class ChosenToken(NamedTuple):
    """The next output token of a job; `reused` tokens of its prompt were not computed."""

    job: Job
    token: int
    reused: int
    is_first: bool


def deliver(job: Job, tokens: list[int], reused: int) -> None:
    """Detokenise, look for stop words, emit. What goes wrong is one request's own, so only that one ends."""
    try:
        job.take(tokens, reused=reused)
    except Exception as error:
        logger.exception("tokens could not be delivered")
        job.fail(EngineError(f"continuing the answer failed: {error}"))


class Delivery:
    """Makes events of tokens: at once for a few jobs, under load on a thread of its own while the step loop goes on.

    The thread shares the interpreter with the step loop, so it gathers tokens for PACE_S, but for a job's first one.
    """

    def __init__(self, name: str) -> None:
        self._tokens: dict[Job, tuple[list[int], int]] = {}
        self._work: deque[Callable[[], None]] = deque()
        self._delivering = False
        self._urgent = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def tokens(self, chosen: Sequence[ChosenToken]) -> None:
        """Deliver tokens now or soon, each job's in order. Called by one thread only."""
        with self._changed:
            if self._tokens or self._delivering or len(chosen) > BUSY_JOBS:
                self._gather(chosen)
                return
        for job, token, reused, _ in chosen:
            deliver(job, [token], reused)

    def _gather(self, chosen: Iterable[ChosenToken]) -> None:
        idle = not self._tokens
        for job, token, reused, is_first in chosen:
            self._tokens.setdefault(job, ([], reused))[0].append(token)
            self._urgent |= is_first
        if idle or self._urgent:
            self._changed.notify()

    def work(self, work: Callable[[], None]) -> None:
        """Do something soon, behind what came before."""
        with self._changed:
            self._work.append(work)
            self._changed.notify()

    def close(self) -> None:
        """Do what is left, then end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        busy = False
        while True:
            with self._changed:
                if busy:
                    self._changed.wait_for(lambda: self._urgent or self._closing, PACE_S)
                self._changed.wait_for(lambda: self._tokens or self._work or self._closing)
                tokens, self._tokens = self._tokens, {}
                work, self._work = self._work, deque()
                self._urgent, self._delivering = False, bool(tokens)
                if self._closing and not tokens and not work:
                    return
            busy = len(tokens) > BUSY_JOBS
            for job, (ids, reused) in tokens.items():
                deliver(job, ids, reused)
            with self._changed:
                self._delivering = False
            for one in work:
                _do(one)


def _do(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        logger.exception("work behind the step loop failed")
