"""One packed call's inputs: built on the host, one copy to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 4  # int32 values: 16 bytes, so that kernels may read four at a time
_RING = 3  # one that is being filled, one that is being copied, one to spare

Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class PackedStep:
    """B sequences with `counts` [B] new tokens each, T in all; int32 throughout.

    `ids` [T] are tokens, or -1 - s for the token last chosen for slot s. `positions` [axes, T] are rotary positions,
    and `past` [B] the tokens that each sequence has in the cache, in the blocks of `tables` [B, M].
    Logits are wanted of the tokens at `logits_rows` [R]; they choose the next token of `slots` [R].
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

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, the new ones included."""
        return int((self.past + self.counts).max())

    @property
    def is_decode(self) -> bool:
        """One token for each sequence, and each gets its next one."""
        return self.features is None and len(self.ids) == len(self.counts) == len(self.logits_rows)


class StepBuffer:
    """int32 memory on the device, filled by one asynchronous copy per step from one of a ring of host buffers.

    The device's copy may be read until the next `upload`, in the stream's order. A caller must wait for a step before
    it begins the next but one, or the host buffer would change while it is copied.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(_RING)]
        self._views = [tensor.numpy() for tensor in self._host]
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._turn = 0

    def upload(self, layout: Layout, parts: Mapping[str, Int32]) -> None:
        """Copy the parts to where `layout` has them; a part shorter than its place leaves the end as it is."""
        self._turn = (self._turn + 1) % _RING
        view = self._views[self._turn]
        for name, array in parts.items():
            start = layout.starts[name]
            view[start : start + array.size] = array.ravel()
        self._device[: layout.size].copy_(self._host[self._turn][: layout.size], non_blocking=True)

    def view(self, layout: Layout, name: str) -> torch.Tensor:
        """The part on the device, in its shape."""
        shape, start = layout.shapes[name], layout.starts[name]
        return self._device[start : start + int(np.prod(shape))].view(shape)


class Layout:
    """Where parts of given shapes lie in a buffer."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.starts: dict[str, int] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.starts[name] = self.size
            self.size += -(-int(np.prod(shape)) // _ALIGNMENT) * _ALIGNMENT
