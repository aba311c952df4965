"""Tokens become text and events."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import EngineError
from engine.job import Job

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """Output token number `count` of a job; `reused` tokens of its prompt were not computed."""

    job: Job
    token: int
    count: int
    reused: int


def deliver(chosen: list[ChosenToken]) -> None:
    """Detokenise, look for stop words, emit. What goes wrong is one request's own, so only that one ends."""
    for one in chosen:
        try:
            one.job.token(one.token, count=one.count, reused=one.reused)
        except Exception as error:
            logger.exception("a token could not be delivered")
            one.job.fail(EngineError(f"continuing the answer failed: {error}"))


class Delivery:
    """A thread that does things in order, so that the step loop goes on while the device works."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __call__(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def close(self) -> None:
        """Do what is left, then end."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except Exception:
                logger.exception("work behind the step loop failed")
