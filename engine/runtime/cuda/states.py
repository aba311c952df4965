"""The states of linear attention layers on a device: those of a step's sequences lie side by side, in its order.

ONNX Runtime's operators take the states of a step's B sequences as one tensor and may write where they read. So a step
is given the first B rows of this memory, captured steps the first rows of their bucket, and nothing is gathered. What
has to be moved for that is a row or two when sequences come and go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engine.graphs.cuda import STATE_PARTS, StepInputs
from engine.spec import DeltaNetSpec


class DeltaNetStates:
    """A row for each of `slots` sequences, one to change places with, and places for copies. The device's thread only.

    A slot has a row from the first step of its sequence on until it is released.
    """

    def __init__(self, spec: DeltaNetSpec, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is that of activations. Raises torch.OutOfMemoryError."""
        self._spec = spec
        self._slots = slots
        self._rows = _memory(spec, slots + 1, dtype, device)
        self._copies = _memory(spec, 0, dtype, device)
        self._row_of: dict[int, int] = {}  # of each slot that has one
        self._slot_at: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in (*self._rows, *self._copies))

    @property
    def state_bytes(self) -> int:
        """What all layers keep of a sequence."""
        return sum(memory[:, 0].nbytes for memory in self._rows)

    def make_places(self, count: int) -> None:
        """For as many copies. Raises torch.OutOfMemoryError."""
        _, windows = self._rows
        self._copies = _memory(self._spec, count, windows.dtype, windows.device)

    def bound(self, count: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """A graph's inputs and outputs for the first `count` rows, the same memory."""
        inputs, outputs = {}, {}
        for memory, part in zip(self._rows, STATE_PARTS, strict=True):
            for number, layer in enumerate(self._spec.layers):
                rows = memory[number, :count]
                inputs[StepInputs.state(part, layer)] = rows
                outputs[StepInputs.state_out(part, layer)] = rows
        return inputs, outputs

    def clear(self, rows: Iterable[int]) -> None:
        """The state before the first token."""
        for row in rows:
            for memory in self._rows:
                memory[:, row].zero_()

    def arrange(self, *groups: Sequence[int]) -> list[list[int]]:
        """Put the slots of each group into the rows behind those of the group before; each group in its rows' order.

        Those that have no row get one, whose state is whatever was there.
        """
        arranged, first = [], 0
        for group in groups:
            stop = first + len(group)
            wanted, free = set(group), []
            for row in range(first, stop):
                if self._slot_at.get(row) not in wanted:
                    free.append(row)
            for slot in group:
                if not first <= self._row_of.get(slot, -1) < stop:
                    self._move(slot, free.pop(0))
            arranged.append([self._slot_at[row] for row in range(first, stop)])
            first = stop
        return arranged

    def free_from(self, row: int, stop: int) -> bool:
        """Whether rows [row, stop) belong to nobody."""
        return stop <= self._slots and not any(place in self._slot_at for place in range(row, stop))

    def holds(self, slot: int) -> bool:
        return slot in self._row_of

    def release(self, slot: int) -> None:
        """Nobody needs the slot's state any more; harmless for one that has none."""
        row = self._row_of.pop(slot, None)
        if row is not None:
            del self._slot_at[row]

    def keep(self, slot: int, place: int) -> None:
        """Copy the slot's state, as it will be after all steps so far."""
        row = self._row_of[slot]
        for copies, rows in zip(self._copies, self._rows, strict=True):
            copies[:, place].copy_(rows[:, row])

    def restore(self, slot: int, place: int) -> None:
        """Give the slot a row, if it has none, and the state that was kept at `place`."""
        if slot not in self._row_of:
            self._put(slot, next(row for row in range(self._slots) if row not in self._slot_at))
        row = self._row_of[slot]
        for copies, rows in zip(self._copies, self._rows, strict=True):
            rows[:, row].copy_(copies[:, place])

    def _move(self, slot: int, row: int) -> None:
        """The slot's state to the row, and whatever is there to where it came from, or to a row that is free."""
        other, source = self._slot_at.get(row), self._row_of.get(slot)
        if other is not None:
            target = source
            if target is None:
                target = next(free for free in range(self._slots) if free not in self._slot_at)
            self._copy(row, self._slots)
            if source is not None:
                self._copy(source, row)
            self._copy(self._slots, target)
            self._put(other, target)
        elif source is not None:
            del self._slot_at[source]
            self._copy(source, row)
        self._put(slot, row)

    def _put(self, slot: int, row: int) -> None:
        self._row_of[slot] = row
        self._slot_at[row] = slot

    def _copy(self, source: int, target: int) -> None:
        for memory in self._rows:
            memory[:, target].copy_(memory[:, source])


def _memory(
    spec: DeltaNetSpec, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recurrent states [layers, rows, value_heads, value_dim, key_dim] fp32, windows [.., conv_width, kernel - 1]."""
    shape = (len(spec.layers), rows)
    return (
        torch.zeros((*shape, spec.value_heads, spec.value_dim, spec.key_dim), device=device),
        torch.zeros((*shape, spec.conv_width, spec.kernel - 1), dtype=dtype, device=device),
    )
