"""KV memory in blocks that sequences share: the block pool and its prefix index.

Blocks are counted references to places of the device's caches. A full block is known by a digest of all tokens up to
its end; one that no sequence uses any more stays findable until its place is needed, least recently used first (the
scheme of vLLM's automatic prefix caching, vllm/v1/core/block_pool.py).

With linear attention a sequence has a state as well, which is known only for where the sequence stands. Copies of some
are kept, under the digest of the block that ends there, and a prompt goes on from the longest known prefix with one:
somebody's last whole chunk, or what two prompts had in common (as in `engine.scheduling.kv_cache`).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.scheduling.sequence import Sequence

_WORTH_A_STATE = 256  # tokens: nobody waits for fewer to be computed again


class StateMemory(Protocol):
    """What the cache needs of the states of linear attention: `engine.runtime.cuda.states`."""

    def holds(self, slot: int) -> bool: ...
    def keep(self, slot: int, place: int) -> None: ...
    def restore(self, slot: int, place: int) -> None: ...
    def release(self, slot: int) -> None: ...


class PagedKVCache:
    """Slots, blocks and prefixes of one decoder on a device. Used by the step loop's thread only.

    `tables` [slots, blocks of the longest sequence] int32 holds each slot's blocks in order; a place that is not in use
    holds block 0, which belongs to nobody and takes what padding rows write.
    """

    def __init__(
        self,
        *,
        slots: int,
        blocks: int,
        block_size: int,
        context_length: int,
        states: StateMemory | None = None,
        copies: int = 0,
        chunk: int = 0,
    ) -> None:
        """`blocks` counts those that sequences can have, besides block 0. `states` has places for `copies` of states;
        of a prompt, one is taken at a multiple of `chunk` tokens.
        """
        self.blocks = blocks
        self.block_size = block_size
        self.tables: NDArray[np.int32] = np.zeros((slots, -(-context_length // block_size)), np.int32)
        self._free_slots = list(range(slots))
        self._owned: dict[int, list[int]] = {}  # slot -> blocks
        self._uses = [0] * (blocks + 1)
        self._digests: dict[int, bytes] = {}  # block -> digest, for full blocks
        self._known: dict[bytes, int] = {}  # digest -> block
        self._empty = list(range(blocks, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, not in use
        self._states = states
        self._chunk = chunk
        self._copies: OrderedDict[bytes, int] = OrderedDict()  # digest -> place, least recently used first
        self._empty_places = list(range(copies))

    @property
    def capacity(self) -> int:
        """Tokens one sequence could have if it were alone."""
        return self.blocks * self.block_size

    @property
    def used_blocks(self) -> int:
        """Blocks of running sequences, shared ones once."""
        return self.blocks - len(self._empty) - len(self._idle)

    @property
    def indexed_blocks(self) -> int:
        return len(self._known)

    @property
    def survives_failures(self) -> bool:
        """A state may have been written when a step failed."""
        return self._states is None

    def admit(self, sequence: Sequence) -> bool:
        """Give the sequence a slot and blocks for all its tokens and the next, the longest known prefix among them."""
        if not self._free_slots:
            return False
        known = self._match(sequence)
        count, place = self._restorable(sequence, len(known))
        shared = known[:count]
        needed = self._count(sequence.length + 1) - len(shared)
        unused = sum(1 for block in shared if not self._uses[block])
        if needed > len(self._empty) + len(self._idle) - unused:
            return False
        for block in shared:
            self._use(block)
        slot = heapq.heappop(self._free_slots)
        self._owned[slot] = shared + [self._take() for _ in range(needed)]
        self.tables[slot, : len(self._owned[slot])] = self._owned[slot]
        sequence.row, sequence.computed = slot, len(shared) * self.block_size
        sequence.reused, sequence.prefill_end = sequence.computed, sequence.length
        if self._states is not None and place is not None:
            self._states.restore(slot, place)
        sequence.pauses = self._pauses(sequence, len(known))
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Make room for the token after the newest one; False when no block is left."""
        assert sequence.row is not None, "This is a bug: a waiting sequence cannot grow."
        owned = self._owned[sequence.row]
        while len(owned) < self._count(sequence.length + 1):
            if not (self._empty or self._idle):
                return False
            owned.append(self._take())
            self.tables[sequence.row, len(owned) - 1] = owned[-1]
        return True

    def spare(self, sequence: Sequence) -> int:
        """How many more tokens its blocks hold, beside those it has and the next."""
        assert sequence.row is not None, "This is a bug: a waiting sequence has no blocks."
        return len(self._owned[sequence.row]) * self.block_size - sequence.length - 1

    def free(self, sequence: Sequence) -> None:
        """Take slot and blocks back; harmless for a sequence that has none. What is full stays findable."""
        if sequence.row is None:
            return
        self.store(sequence)
        owned = self._owned.pop(sequence.row)
        for block in reversed(owned):  # so that a chain loses its end before its beginning
            self._drop(block)
        self.tables[sequence.row, : len(owned)] = 0
        if self._states is not None:
            self._states.release(sequence.row)
        heapq.heappush(self._free_slots, sequence.row)
        sequence.row = None

    def store(self, sequence: Sequence) -> None:
        """Make the full blocks computed so far findable. A digest that another block has already stays with that."""
        if sequence.row is None:
            return
        owned = self._owned[sequence.row]
        known = min(sequence.computed, sequence.known) // self.block_size
        for block, digest in zip(owned, sequence.block_hashes(self.block_size)[:known], strict=False):
            if block not in self._digests and digest not in self._known:
                self._digests[block] = digest
                self._known[digest] = block
        if known and sequence.computed == known * self.block_size:
            self._store_state(sequence.row, sequence.block_hashes(self.block_size)[known - 1])

    def _store_state(self, slot: int, digest: bytes) -> None:
        """The state of a slot whose tokens so far end with a block, if there is a place or one can be had."""
        if self._states is None or not self._states.holds(slot) or digest not in self._known:
            return
        if digest not in self._copies:
            if not (self._empty_places or self._copies):
                return
            place = self._empty_places.pop() if self._empty_places else self._copies.popitem(last=False)[1]
            self._states.keep(slot, place)
            self._copies[digest] = place
        self._copies.move_to_end(digest)

    def _restorable(self, sequence: Sequence, known: int) -> tuple[int, int | None]:
        """From the end of how many of the `known` blocks the sequence can go on, and where the state there is kept."""
        if self._states is None:
            return known, None
        hashes = sequence.block_hashes(self.block_size)
        for count in range(known, 0, -1):
            place = self._copies.get(hashes[count - 1])
            if place is not None:
                self._copies.move_to_end(hashes[count - 1])
                return count, place
        return 0, None

    def _pauses(self, sequence: Sequence, known: int) -> tuple[int, ...]:
        """Tokens after which prefill stops for the state to be kept: the last whole chunk, and the `known` blocks."""
        if self._states is None or not (self._empty_places or self._copies):
            return ()
        places = {(sequence.length - 1) // self._chunk * self._chunk // self.block_size * self.block_size}
        if known * self.block_size - sequence.computed >= _WORTH_A_STATE:
            places.add(known * self.block_size)
        return tuple(sorted(place for place in places if sequence.computed < place < sequence.length))

    def _match(self, sequence: Sequence) -> list[int]:
        """Known blocks from the start; at least the last token is left, because its logits are needed."""
        matched = []
        for digest in sequence.block_hashes(self.block_size)[: (sequence.length - 1) // self.block_size]:
            block = self._known.get(digest)
            if block is None:
                break
            matched.append(block)
        while matched and sequence.prompt.cuts_image(len(matched) * self.block_size):
            matched.pop()
        return matched

    def _use(self, block: int) -> None:
        self._uses[block] += 1
        self._idle.pop(block, None)

    def _take(self) -> int:
        """An empty block, or the one that was idle longest."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._digests.pop(block)]
        self._uses[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._uses[block] -= 1
        if self._uses[block]:
            return
        if block in self._digests:
            self._idle[block] = None
        else:
            self._empty.append(block)

    def _count(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
