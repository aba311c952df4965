"""Keys and values of all rows, committed page by page as they are written."""

from __future__ import annotations

import math
import mmap

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidConfig
from engine.spec import DecoderSpec

_MAP_NORESERVE = 0x4000  # Linux; Python 3.12's mmap does not name it


def reserved(size: int, purpose: str) -> mmap.mmap:
    """An anonymous mapping of `size` bytes, zeros, that costs nothing where it was never written.

    Raises InvalidConfig if the address space does not suffice.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        mapping = mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError) as error:
        raise InvalidConfig(
            f"{purpose} need {size / 2**30:.1f} GiB of addresses, which the system refuses;"
            " lower max_batch_size or kv_cache_mib"
        ) from error
    # Huge pages would commit 2 MiB for a sequence of ten tokens.
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping


class KVMemory:
    """One anonymous mapping [attention layers, 2, rows, kv_heads, capacity, head_dim], fp32.

    A row of one layer is a slab of whole pages, so that it can be given back; a page that was never written costs
    nothing.
    """

    def __init__(self, spec: DecoderSpec, rows: int, tokens: int) -> None:
        """`capacity` is at least `tokens`. Raises InvalidConfig if the address space does not suffice."""
        token_bytes = spec.kv_heads * spec.head_dim * 4
        step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, token_bytes)
        self.capacity = -(-tokens // step) * step
        shape = (len(spec.attention_layers), 2, rows, spec.kv_heads, self.capacity, spec.head_dim)
        self._mapping = reserved(math.prod(shape) * 4, f"keys and values of {rows} sequences of {tokens} tokens")
        self._array = np.frombuffer(self._mapping, np.float32).reshape(shape)
        self._slab_bytes = token_bytes * self.capacity

    def view(self, layer: int, part: int, first: int, count: int) -> NDArray[np.float32]:
        """Keys (part 0) or values (1) of neighbouring rows: [count, kv_heads, capacity, head_dim], not a copy.

        `layer` counts those that have a KV cache.
        """
        return self._array[layer, part, first : first + count]

    def read(self, row: int, start: int, stop: int) -> NDArray[np.float32]:
        """A copy [layers, 2, kv_heads, stop - start, head_dim]."""
        return self._array[:, :, row, :, start:stop].copy()

    def write(self, row: int, start: int, kv: NDArray[np.float32]) -> None:
        self._array[:, :, row, :, start : start + kv.shape[3]] = kv

    def release(self, row: int) -> None:
        """Give the row's pages back; it reads as zeros."""
        layers, parts, rows = self._array.shape[:3]
        for slab in range(layers * parts):
            self._mapping.madvise(mmap.MADV_DONTNEED, (slab * rows + row) * self._slab_bytes, self._slab_bytes)
