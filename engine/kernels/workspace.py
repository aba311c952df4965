"""Scratch memory of a device: one buffer for all operators, which run one after another on one stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch

from engine.errors import DeviceOutOfMemory

ALIGNMENT = 256  # bytes; what cudaMalloc gives, and more than any vector load needs
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
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised, contiguous, aligned to ALIGNMENT bytes; DeviceOutOfMemory if it does not fit."""
        size, start = prod(shape), self._used
        end = start + aligned(size * dtype.itemsize)
        if end > self.nbytes:
            raise DeviceOutOfMemory(
                f"{dtype} {list(shape)} needs {end - start} bytes of the kernels' workspace on {self.device}; "
                f"{self.nbytes - start} of {self.nbytes} are free: it was sized for calls of fewer tokens"
            )
        self._used = end
        view = self._views.get(dtype)
        if view is None:
            view = self._views[dtype] = self._buffer.view(dtype)
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return view.as_strided(shape, strides, start // dtype.itemsize)  # one call of torch; slicing takes three

    @contextmanager
    def scope(self) -> Iterator[None]:
        start = self._used
        try:
            yield
        finally:
            self._used = start
