"""Changes of a CPU decoder's memory, in their turn among its steps."""

from __future__ import annotations

import heapq
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engine.runners.step_thread import StepThread, Turn
from engine.runtime import Decoder


class OrderedMemory:
    """Implements `KVMemory`. Steps and changes of rows are carried out by `thread`, one after another as they came.

    A decode call computes all of the decoder's rows from the lowest to the highest that decode. So a row that was given
    to a sequence is one of the decoder's from its first token on, the lowest that is free, and none while the sequence
    waits for the tower.

    A row that is given back, and what is copied into it for its next sequence, so wait for the steps that were launched
    before, which may write to it still. Reading KV does not wait: it is of tokens that no step under way computes.
    """

    def __init__(self, decoder: Decoder, thread: StepThread) -> None:
        self._decoder = decoder
        self._thread = thread
        self._changes: list[Turn[None]] = []
        self._places: dict[int, int] = {}  # the decoder's row of each that has tokens
        self._free_places = list(range(decoder.rows))

    @property
    def rows(self) -> int:
        return self._decoder.rows

    def place(self, row: int) -> int:
        """The decoder's row."""
        if row not in self._places:
            self._places[row] = heapq.heappop(self._free_places)
        return self._places[row]

    def take_changes(self) -> list[Turn[None]]:
        """What the next step builds on: if one of them fails, the step must."""
        taken, self._changes = self._changes, []
        return taken

    def read_kv(self, row: int, start: int, stop: int) -> NDArray[np.float32]:
        return self._decoder.read_kv(self.place(row), start, stop)

    def write_kv(self, row: int, start: int, kv: NDArray[np.float32]) -> None:
        self._changes.append(self._thread.submit(partial(self._decoder.write_kv, self.place(row), start, kv)))

    def read_state(self, row: int) -> NDArray[np.float32]:
        return self._thread.submit(partial(self._decoder.read_state, self.place(row))).result()

    def write_state(self, row: int, state: NDArray[np.float32]) -> None:
        self._changes.append(self._thread.submit(partial(self._decoder.write_state, self.place(row), state)))

    def release(self, row: int) -> None:
        place = self._places.pop(row, None)
        if place is not None:
            heapq.heappush(self._free_places, place)
            self._changes.append(self._thread.submit(partial(self._decoder.release, place)))
