"""Who may use how much KV memory, and the prefix index over what was computed before.

Memory is counted in blocks of BLOCK tokens. A running sequence owns one row of the decoder and the blocks its tokens
fill; the prefix index owns copies of blocks, each under a digest of all tokens up to its end (the scheme of vLLM's
automatic prefix caching), least recently used first out. Running sequences come before the index.

With linear attention a row has a state as well, of one size whatever its length, that is known only for where the row
stands. So the index keeps copies of states too, each counted as the blocks that it is as large as, and a prompt goes on
from the longest known prefix that has one. Two of a prompt's are kept: at its last whole chunk, and where it parted
from a prefix whose state nobody had kept, because what two prompts share, a third may.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.scheduling.sequence import Sequence

BLOCK = 16  # tokens
_WORTH_A_STATE = 4  # blocks: nobody waits for fewer to be computed again


class KVMemory(Protocol):
    """What the cache needs of the decoder. kv: float32 [layers, 2, kv_heads, tokens, head_dim]; state: float32 [n]."""

    @property
    def rows(self) -> int: ...
    def read_kv(self, row: int, start: int, stop: int) -> NDArray[np.float32]: ...
    def write_kv(self, row: int, start: int, kv: NDArray[np.float32]) -> None: ...
    def read_state(self, row: int) -> NDArray[np.float32]: ...
    def write_state(self, row: int, state: NDArray[np.float32]) -> None: ...
    def release(self, row: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Kept:
    """KV of a block, or a state, and the blocks that it counts as."""

    values: NDArray[np.float32]
    blocks: int = 1


class KVCache:
    """Rows, blocks and prefixes of one decoder. Used by the step loop's thread only."""

    def __init__(
        self, memory: KVMemory, blocks: int, *, reuse: bool = True, state_blocks: int = 0, chunk: int = BLOCK
    ) -> None:
        """`state_blocks` is what a row's state counts as, 0 for rows without; prefill stops at multiples of `chunk`."""
        self._memory = memory
        self._reuse = reuse
        self._free_rows = list(range(memory.rows))
        self._owned: dict[int, int] = {}  # row -> blocks
        self._index: OrderedDict[bytes, _Kept] = OrderedDict()  # by digest, or by _state_of one
        self._state_blocks = state_blocks
        self._chunk = chunk
        self.blocks = blocks
        self.indexed_blocks = 0

    @property
    def capacity(self) -> int:
        """Tokens one sequence could have if it were alone."""
        return max(0, self.blocks - self._state_blocks) * BLOCK

    @property
    def used_blocks(self) -> int:
        """Blocks of running sequences; the index gives way to them."""
        return sum(self._owned.values())

    @property
    def survives_failures(self) -> bool:
        """A state may have been written when a step failed."""
        return not self._state_blocks

    def admit(self, sequence: Sequence) -> bool:
        """Give the sequence a row and blocks for all its tokens and the next; copy in the longest known prefix."""
        if not self._free_rows:
            return False
        known = self._match(sequence)
        count, state = self._restorable(sequence, len(known))
        if not self._reserve(self._needed(sequence)):
            return False
        row = heapq.heappop(self._free_rows)
        self._owned[row] = self._needed(sequence)
        for index, kv in enumerate(known[:count]):
            self._memory.write_kv(row, index * BLOCK, kv)
        if state is not None:
            self._memory.write_state(row, state)
        sequence.row, sequence.computed, sequence.reused = row, count * BLOCK, count * BLOCK
        sequence.pauses = self._pauses(sequence, len(known))
        # After a set-back, output is computed by decode steps again, as it was the first time: prefill sums in another
        # order, and the last bits would differ.
        sequence.prefill_end = len(sequence.prompt.token_ids)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Make room for the token after the newest one; False when no block is left."""
        assert sequence.row is not None, "This is a bug: a waiting sequence cannot grow."
        needed = self._needed(sequence) - self._owned[sequence.row]
        if needed > 0:
            if not self._reserve(needed):
                return False
            self._owned[sequence.row] += needed
        return True

    def spare(self, sequence: Sequence) -> int:
        """How many more tokens its blocks hold, beside those it has and the next."""
        assert sequence.row is not None, "This is a bug: a waiting sequence has no blocks."
        return (self._owned[sequence.row] - self._state_blocks) * BLOCK - sequence.length - 1

    def free(self, sequence: Sequence) -> None:
        """Take row and blocks back; harmless for a sequence that has none."""
        if sequence.row is None:
            return
        del self._owned[sequence.row]
        self._memory.release(sequence.row)
        heapq.heappush(self._free_rows, sequence.row)
        sequence.row = None

    def store(self, sequence: Sequence) -> None:
        """Copy the full blocks computed so far into the index, as far as spare memory reaches.

        Not what steps under way compute. The row's state too, if the last of them ends where the row stands.
        """
        if not self._reuse or sequence.row is None:
            return
        hashes = sequence.block_hashes(BLOCK)[: (sequence.computed - sequence.pending) // BLOCK]
        self._touch(hashes)
        known = next((index for index, digest in enumerate(hashes) if digest not in self._index), len(hashes))
        count = min(len(hashes) - known, self.blocks - self.used_blocks)
        if count > 0 and self._reserve(count):
            kv = self._memory.read_kv(sequence.row, known * BLOCK, (known + count) * BLOCK)
            for place, digest in enumerate(hashes[known : known + count]):
                self._keep(digest, _Kept(kv[:, :, :, place * BLOCK : (place + 1) * BLOCK]))
        if self._state_blocks and hashes and sequence.computed == len(hashes) * BLOCK:
            self._store_state(sequence.row, hashes[-1])
        self._touch(hashes)

    def _store_state(self, row: int, digest: bytes) -> None:
        if _state_of(digest) not in self._index and self._reserve(self._state_blocks) and digest in self._index:
            self._keep(_state_of(digest), _Kept(self._memory.read_state(row), self._state_blocks))

    def _match(self, sequence: Sequence) -> list[NDArray[np.float32]]:
        """Known blocks from the start; at least the last token is left, because its logits are needed."""
        matched = []
        hashes = sequence.block_hashes(BLOCK)[: (sequence.length - 1) // BLOCK]
        for digest in hashes:
            kept = self._index.get(digest)
            if kept is None:
                break
            matched.append(kept.values)
        while matched and sequence.prompt.cuts_image(len(matched) * BLOCK):
            matched.pop()
        self._touch(hashes[: len(matched)])
        return matched

    def _restorable(self, sequence: Sequence, known: int) -> tuple[int, NDArray[np.float32] | None]:
        """From the end of how many of the `known` blocks a row can go on, and the state there."""
        if not self._state_blocks:
            return known, None
        hashes = sequence.block_hashes(BLOCK)
        for count in range(known, 0, -1):
            kept = self._index.get(_state_of(hashes[count - 1]))
            if kept is not None:
                return count, kept.values
        return 0, None

    def _pauses(self, sequence: Sequence, known: int) -> tuple[int, ...]:
        """Tokens after which prefill stops for the state to be kept: the last whole chunk, and the `known` blocks."""
        if not self._state_blocks or not self._reuse:
            return ()
        prompt = len(sequence.prompt.token_ids)
        places = {(prompt - 1) // self._chunk * self._chunk // BLOCK * BLOCK}
        if known - sequence.computed // BLOCK >= _WORTH_A_STATE:
            places.add(known * BLOCK)
        return tuple(sorted(place for place in places if sequence.computed < place < prompt))

    def _touch(self, hashes: list[bytes]) -> None:
        """Mark as used, the last block first, so that a chain loses its end before its beginning."""
        for digest in reversed(hashes):
            for name in (_state_of(digest), digest):
                if name in self._index:
                    self._index.move_to_end(name)

    def _keep(self, name: bytes, kept: _Kept) -> None:
        """Into memory that was reserved."""
        if name not in self._index:  # a later block of a chain may be there still when an earlier one is not
            self._index[name] = kept
            self.indexed_blocks += kept.blocks

    def _reserve(self, blocks: int) -> bool:
        available = self.blocks - self.used_blocks
        if blocks > available:
            return False
        while self.indexed_blocks > available - blocks:
            self.indexed_blocks -= self._index.popitem(last=False)[1].blocks
        return True

    def _needed(self, sequence: Sequence) -> int:
        """Blocks for all tokens and the next, and for the state."""
        return _blocks(sequence.length + 1) + self._state_blocks


def _state_of(digest: bytes) -> bytes:
    """The index's name for the state at the end of a block."""
    return b"state" + digest


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)
