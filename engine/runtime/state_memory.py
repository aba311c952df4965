"""The states of linear attention layers, of all rows."""

from __future__ import annotations

import math
import mmap

import numpy as np
from numpy.typing import NDArray

from engine.runtime.kv_memory import reserved
from engine.spec import DeltaNetSpec

PARTS = ("recurrent", "window")


class StateMemory:
    """Recurrent states [layers, rows, value_heads, key_dim, value_dim], and the last kernel - 1 inputs of the causal
    convolutions [layers, rows, kernel - 1, conv_width], fp32; layers are the spec's linear ones.

    Committed page by page as rows are first used, and given back with them.
    """

    def __init__(self, spec: DeltaNetSpec, rows: int) -> None:
        """Raises InvalidConfig if the address space does not suffice."""
        shapes = (
            (len(spec.layers), rows, spec.value_heads, spec.key_dim, spec.value_dim),
            (len(spec.layers), rows, spec.kernel - 1, spec.conv_width),
        )
        self.row_bytes = spec.state_bytes
        purpose = f"linear attention's states of {rows} sequences"
        self._mappings = tuple(reserved(4 * math.prod(shape), purpose) for shape in shapes)
        self._arrays = tuple(
            np.frombuffer(mapping, np.float32).reshape(shape)
            for mapping, shape in zip(self._mappings, shapes, strict=True)
        )

    def view(self, layer: int, part: int, first: int, count: int) -> NDArray[np.float32]:
        """Recurrent states (part 0) or windows (1) of neighbouring rows, not a copy. `layer` counts linear ones."""
        return self._arrays[part][layer, first : first + count]

    def read(self, row: int) -> NDArray[np.float32]:
        """A copy [state_values]."""
        return np.concatenate([array[:, row].reshape(-1) for array in self._arrays])

    def write(self, row: int, state: NDArray[np.float32]) -> None:
        """Put back what `read` gave."""
        start = 0
        for array in self._arrays:
            place = array[:, row]
            place[...] = state[start : start + place.size].reshape(place.shape)
            start += place.size

    def clear(self, row: int) -> None:
        """The state before the first token."""
        for array in self._arrays:
            array[:, row] = 0

    def release(self, row: int) -> None:
        """Give the row's whole pages back; its state is undefined until it is cleared or written."""
        for mapping, array in zip(self._mappings, self._arrays, strict=True):
            size = array[0, 0].nbytes
            for layer in range(len(array)):
                start = (layer * array.shape[1] + row) * size
                first, end = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
                if end > first:
                    mapping.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)
