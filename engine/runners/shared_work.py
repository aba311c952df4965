"""A list of calls that several threads empty together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable


class SharedWork[Item, Result]:
    """`call` of each of `items`, once, by whichever thread in `run` is free. `results` are in the order of the items.

    A call that raises ends the `run` of its thread; the others go on.
    """

    def __init__(self, call: Callable[[Item], Result], items: Iterable[Item]) -> None:
        self._call = call
        self._waiting = deque(enumerate(items))
        self._done: dict[int, Result] = {}

    def run(self) -> None:
        """Returns when nothing is left to begin; other threads may still be at theirs."""
        while self._waiting:
            try:
                place, item = self._waiting.popleft()
            except IndexError:  # another thread was quicker
                return
            self._done[place] = self._call(item)

    @property
    def results(self) -> list[Result]:
        """Once every `run` has returned."""
        return [result for _, result in sorted(self._done.items())]
