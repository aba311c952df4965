"""Scratch memory of a device: one buffer for all operators, which run one after another on one stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch

from engine.errors import DeviceOutOfMemory

ALIGNMENT = 256  # bytes; what cudaMalloc gives, and more than any vector load needs
_MOST_TAKEN = 4096  # tensors that are known; a step of a new length has a few
TICKETS = 4096  # more than the tiles of any product that is split along its depth


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def bytes_of(*tensors: tuple[int, torch.dtype]) -> int:
    """What tensors of these sizes (elements, type) take when they are live at once."""
    return sum(aligned(size * dtype.itemsize) for size, dtype in tensors)


class Workspace:
    """`nbytes` of scratch memory, and tickets: int32 [TICKETS], 0 between launches; who counts in them resets them.

    What is taken inside a scope is free again after it. The memory is reused without a synchronisation: whatever was
    launched before on the same stream is done with it.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.device = aligned(nbytes), device
        self.tickets = torch.zeros(TICKETS, dtype=torch.int32, device=device)
        self._buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        self._views: dict[torch.dtype, torch.Tensor] = {}
        self._taken: dict[tuple[int, tuple[int, ...], torch.dtype], tuple[torch.Tensor, int]] = {}
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, contiguous, aligned to ALIGNMENT bytes; DeviceOutOfMemory if it does not fit."""
        key = (self._used, shape, dtype)  # all layers of a step take the same
        found = self._taken.get(key)
        if found is None:
            if len(self._taken) == _MOST_TAKEN:
                self._taken.clear()
            found = self._taken[key] = self._cut(*key)
        tensor, self._used = found
        return tensor

    def _cut(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """The tensor from byte `start` on, and the byte behind it."""
        size = prod(shape)
        end = start + aligned(size * dtype.itemsize)
        if end > self.nbytes:
            raise DeviceOutOfMemory(
                f"{dtype} {list(shape)} needs {end - start} bytes of the kernels' workspace on {self.device}; "
                f"{self.nbytes - start} of {self.nbytes} are free: it was sized for calls of fewer tokens"
            )
        view = self._views.get(dtype)
        if view is None:
            view = self._views[dtype] = self._buffer.view(dtype)
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return view.as_strided(shape, strides, start // dtype.itemsize), end  # one call of torch; slicing takes three

    @contextmanager
    def scope(self) -> Iterator[None]:
        start = self._used
        try:
            yield
        finally:
            self._used = start
