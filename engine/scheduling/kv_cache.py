"""Who may use how much KV memory, and the prefix index over what was computed before.

Memory is counted in blocks of BLOCK tokens. A running sequence owns one row of the decoder and the blocks its tokens
fill; the prefix index owns copies of blocks, each under a digest of all tokens up to its end (the scheme of vLLM's
automatic prefix caching), least recently used first out. Running sequences come before the index.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.scheduling.sequence import Sequence

BLOCK = 16  # tokens


class KVMemory(Protocol):
    """What the cache needs of the decoder. kv: float32 [layers, 2, kv_heads, tokens, head_dim]."""

    @property
    def rows(self) -> int: ...
    def read_kv(self, row: int, start: int, stop: int) -> NDArray[np.float32]: ...
    def write_kv(self, row: int, start: int, kv: NDArray[np.float32]) -> None: ...
    def release(self, row: int) -> None: ...


class KVCache:
    """Rows, blocks and prefixes of one decoder. Used by the step loop's thread only."""

    def __init__(self, memory: KVMemory, blocks: int, *, reuse: bool = True) -> None:
        self._memory = memory
        self._reuse = reuse
        self._free_rows = list(range(memory.rows))
        self._owned: dict[int, int] = {}  # row -> blocks
        self._prefixes: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self.blocks = blocks

    @property
    def capacity(self) -> int:
        """Tokens one sequence could have if it were alone."""
        return self.blocks * BLOCK

    @property
    def used_blocks(self) -> int:
        """Blocks of running sequences; the index gives way to them."""
        return sum(self._owned.values())

    @property
    def indexed_blocks(self) -> int:
        return len(self._prefixes)

    def admit(self, sequence: Sequence) -> bool:
        """Give the sequence a row and blocks for all its tokens and the next; copy in the longest known prefix."""
        if not self._free_rows:
            return False
        matched = self._match(sequence)
        if not self._reserve(_blocks(sequence.length + 1)):
            return False
        row = heapq.heappop(self._free_rows)  # low rows first: a decode call runs rows 0 to the highest in use
        self._owned[row] = _blocks(sequence.length + 1)
        for index, kv in enumerate(matched):
            self._memory.write_kv(row, index * BLOCK, kv)
        sequence.row, sequence.computed, sequence.reused = row, len(matched) * BLOCK, len(matched) * BLOCK
        # After a set-back, output is computed by decode steps again, as it was the first time: prefill sums in another
        # order, and the last bits would differ.
        sequence.prefill_end = len(sequence.prompt.token_ids)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Make room for the token after the newest one; False when no block is left."""
        assert sequence.row is not None, "This is a bug: a waiting sequence cannot grow."
        needed = _blocks(sequence.length + 1) - self._owned[sequence.row]
        if needed > 0:
            if not self._reserve(needed):
                return False
            self._owned[sequence.row] += needed
        return True

    def free(self, sequence: Sequence) -> None:
        """Take row and blocks back; harmless for a sequence that has none."""
        if sequence.row is None:
            return
        del self._owned[sequence.row]
        self._memory.release(sequence.row)
        heapq.heappush(self._free_rows, sequence.row)
        sequence.row = None

    def store(self, sequence: Sequence) -> None:
        """Copy the full blocks computed so far into the index, as far as spare memory reaches."""
        if not self._reuse or sequence.row is None:
            return
        hashes = sequence.block_hashes(BLOCK)[: sequence.computed // BLOCK]
        self._touch(hashes)
        known = next((index for index, digest in enumerate(hashes) if digest not in self._prefixes), len(hashes))
        count = min(len(hashes) - known, self.blocks - self.used_blocks)
        if count <= 0 or not self._reserve(count):
            return
        kv = self._memory.read_kv(sequence.row, known * BLOCK, (known + count) * BLOCK)
        for digest, block in zip(hashes[known:], np.split(kv, count, axis=3), strict=False):
            self._prefixes[digest] = block
        self._touch(hashes)

    def _match(self, sequence: Sequence) -> list[NDArray[np.float32]]:
        """Known blocks from the start; at least the last token is left, because its logits are needed."""
        matched = []
        hashes = sequence.block_hashes(BLOCK)[: (sequence.length - 1) // BLOCK]
        for digest in hashes:
            kv = self._prefixes.get(digest)
            if kv is None:
                break
            matched.append(kv)
        self._touch(hashes[: len(matched)])
        return matched

    def _touch(self, hashes: list[bytes]) -> None:
        """Mark as used, the last block first, so that a chain loses its end before its beginning."""
        for digest in reversed(hashes):
            if digest in self._prefixes:
                self._prefixes.move_to_end(digest)

    def _reserve(self, blocks: int) -> bool:
        available = self.blocks - self.used_blocks
        if blocks > available:
            return False
        while len(self._prefixes) > available - blocks:
            self._prefixes.popitem(last=False)
        return True


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)
