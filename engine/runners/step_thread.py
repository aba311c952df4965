"""A thread that does what it is given in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple


class _Value[Result](NamedTuple):
    value: Result


class Turn[Result]:
    """A call on its way through the thread."""

    __slots__ = ("_outcome",)

    def __init__(self) -> None:
        self._outcome: queue.SimpleQueue[_Value[Result] | Exception] = queue.SimpleQueue()

    def run(self, call: Callable[[], Result]) -> None:
        try:
            self._outcome.put(_Value(call()))
        except Exception as problem:  # noqa: BLE001  whatever it is belongs to whoever reads the result
            self._outcome.put(problem)

    def result(self) -> Result:
        """Wait for the call; raises what it raised. To be read once."""
        outcome = self._outcome.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome.value


class StepThread:
    """One call after another, as a ThreadPoolExecutor of one thread; a step is so short that its futures would show."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit[Result](self, call: Callable[[], Result]) -> Turn[Result]:
        turn: Turn[Result] = Turn()
        self._calls.put(lambda: turn.run(call))
        return turn

    def close(self) -> None:
        """Do what was given, then end."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
