"""One packed call's inputs: built on the host, one copy to the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 4  # int32 values: 16 bytes, so that kernels may read four at a time
_MOST_UPLOADS = 5  # of a step that runs in parts (parts.py)
_RING = 2 * _MOST_UPLOADS + 1  # those of a step that is begun, those of the step before, one to spare

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class PackedStep:
    """B sequences with `counts` [B] new tokens each, T in all; int32 throughout.

    `ids` [T] are tokens, or -1 - s for the token last chosen for slot s. `positions` [axes, T] are rotary positions,
    and `past` [B] the tokens that each sequence has in the cache, in the blocks of `tables` [B, M].
    Logits are wanted of the tokens at `logits_rows` [R]; they choose the next token of `slots` [R].
    With `mutual` the new tokens of a sequence, if it has several, are an image's and see each other in both directions.
    `features` [F, hidden] are image features, `feature_index` [T] their rows or -1; without features both are None.
    """

    ids: Int32
    positions: Int32
    counts: Int32
    past: Int32
    tables: Int32
    logits_rows: Int32
    slots: Int32
    features: torch.Tensor | None = None
    feature_index: Int32 | None = None
    mutual: bool = False

    def go_on(self, tokens: int) -> None:
        """Become a later step of the same sequences, if this one is a decode step: each is so many tokens further."""
        np.add(self.past, tokens, out=self.past)
        np.add(self.positions, tokens, out=self.positions)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, the new ones included."""
        if len(self.ids) == len(self.counts):
            return int(self.past.max()) + 1
        return int((self.past + self.counts).max())

    @property
    def is_decode(self) -> bool:
        """One token for each sequence, and each gets its next one."""
        return self.features is None and len(self.ids) == len(self.counts) == len(self.logits_rows)


class StepBuffer:
    """int32 memory on the device, filled by one asynchronous copy per step from one of a ring of host buffers.

    What is on the device may be read until the next upload, in the stream's order. A caller must wait for a step before
    it begins the next but one, or the host buffer would change while it is copied.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.device = torch.zeros(size, dtype=torch.int32, device=device)
        self.hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(_RING)]
        self.turn = 0

    def place(self, shapes: Mapping[str, Sequence[int]]) -> Placement:
        """Parts of these shapes, from the buffer's beginning on. Raises ValueError if they do not fit."""
        return Placement(self, shapes)


class Placement:
    """Where the parts of a step lie in a buffer. Its addresses stay, so a captured graph may have them."""

    def __init__(self, buffer: StepBuffer, shapes: Mapping[str, Sequence[int]]) -> None:
        self._buffer = buffer
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.starts: dict[str, int] = {}
        self.size = 0
        for name, shape in self._shapes.items():
            self.starts[name] = self.size
            self.size += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        if self.size > len(buffer.device):
            raise ValueError(f"a step of {self.size} values is larger than its buffer of {len(buffer.device)}")
        self._device = buffer.device[: self.size]
        self._hosts: dict[int, tuple[torch.Tensor, Int32, dict[str, Int32]]] = {}

    def view(self, name: str) -> torch.Tensor:
        """The part on the device, in its shape."""
        shape, start = self._shapes[name], self.starts[name]
        return self._buffer.device[start : start + math.prod(shape)].view(shape)

    def upload(self, parts: Mapping[str, Int32]) -> None:
        """Enqueue the copy of a step. A part that is smaller than its place is followed by zeros in every direction."""
        self._buffer.turn = (self._buffer.turn + 1) % _RING
        host, _, views = self._host(self._buffer.turn)
        for name, part in parts.items():
            view = views[name]
            if view.shape != part.shape:
                view.fill(0)
                view = view[tuple([slice(size) for size in part.shape])]
            view[...] = part
        self._device.copy_(host, non_blocking=True)

    def increments(self, names: Iterable[str], count: int) -> Int32:
        """For `go_on`: 1 in the first `count` columns of these parts, 0 elsewhere."""
        flat = np.zeros(self.size, np.int32)
        views = self._views(flat)
        for name in names:
            views[name][..., :count] = 1
        return flat

    def go_on(self, increments: Int32) -> None:
        """Enqueue the copy of what was uploaded last, and here, with something added."""
        _, last, _ = self._host(self._buffer.turn)
        self._buffer.turn = (self._buffer.turn + 1) % _RING
        host, flat, _ = self._host(self._buffer.turn)
        np.add(last, increments, out=flat)
        self._device.copy_(host, non_blocking=True)

    def _host(self, turn: int) -> tuple[torch.Tensor, Int32, dict[str, Int32]]:
        """The ring's buffer, as an array too, and its parts."""
        if turn not in self._hosts:
            host = self._buffer.hosts[turn][: self.size]
            flat = host.numpy()
            self._hosts[turn] = host, flat, self._views(flat)
        return self._hosts[turn]

    def _views(self, flat: Int32) -> dict[str, Int32]:
        return {
            name: flat[start : start + math.prod(self._shapes[name])].reshape(self._shapes[name])
            for name, start in self.starts.items()
        }
