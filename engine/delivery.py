"""Tokens become text and events."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from engine.errors import EngineError
from engine.job import Job

logger = logging.getLogger(__name__)
BUSY_JOBS = 4  # with more of them their tokens are gathered: text costs the same for one token and for several
PACE_S = 0.1  # still ten updates a second for whoever reads along


class ChosenToken(NamedTuple):
    """The next output token of a job; `reused` tokens of its prompt were not computed."""

    job: Job
    token: int
    reused: int
    is_urgent: bool  # somebody waits for it: the first one or the last


def deliver(job: Job, tokens: list[int], reused: int) -> None:
    """Detokenise, look for stop words, emit. What goes wrong is one request's own, so only that one ends."""
    try:
        job.take(tokens, reused=reused)
    except Exception as error:
        logger.exception("tokens could not be delivered")
        job.fail(EngineError(f"continuing the answer failed: {error}"))


class Delivery:
    """Makes events of tokens: at once for a few jobs, under load on a thread of its own while the step loop goes on.

    The thread shares the interpreter with the step loop, so it gathers each job's tokens for PACE_S; a job with an
    urgent one does not wait for the others.
    """

    def __init__(self, name: str) -> None:
        self._tokens: dict[Job, tuple[list[int], int]] = {}
        self._urgent: set[Job] = set()
        self._work: deque[Callable[[], None]] = deque()
        self._delivering = False
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
        for job, token, reused, is_urgent in chosen:
            self._tokens.setdefault(job, ([], reused))[0].append(token)
            if is_urgent:
                self._urgent.add(job)
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
        paced_until = 0.0
        while True:
            with self._changed:
                pause_s = paced_until - time.monotonic()
                if pause_s > 0:
                    self._changed.wait_for(lambda: self._urgent or self._closing, pause_s)
                self._changed.wait_for(lambda: self._tokens or self._work or self._closing)
                is_paced = time.monotonic() < paced_until and not self._closing
                tokens = self._take(self._urgent if is_paced else self._tokens)
                work, self._work = self._work, deque()
                self._delivering = bool(tokens)
                if self._closing and not tokens and not work:
                    return
            if not is_paced:
                paced_until = time.monotonic() + PACE_S if len(tokens) > BUSY_JOBS else 0.0
            for job, (ids, reused) in tokens.items():
                deliver(job, ids, reused)
            with self._changed:
                self._delivering = False
            for one in work:
                _do(one)

    def _take(self, jobs: Iterable[Job]) -> dict[Job, tuple[list[int], int]]:
        taken = {job: self._tokens.pop(job) for job in list(jobs)}
        self._urgent -= taken.keys()
        return taken


def _do(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        logger.exception("work behind the step loop failed")
