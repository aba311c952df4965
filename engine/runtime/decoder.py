"""Runs the decoder: prefill of one row, decode of many, and the rows' KV memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.artifact import Artifact
from engine.graphs.cpu import cpu_decoder
from engine.runtime.kv_memory import KVMemory
from engine.runtime.row_binding import RowBinding
from engine.runtime.session import open_session
from engine.runtime.state_memory import StateMemory

Logits = bool | Literal["all"]
_BINDINGS = 256
_KEPT_BYTES = 2**20  # of an empty row


class Decoder:
    """One ONNX Runtime session and the KV memory of `rows` sequences of up to `context_length` tokens.

    One thread at a time, but for `prefill` of rows that were announced. A row's logits do not depend, to the bit, on
    the rows beside it, on how its prompt was cut into chunks, or on whether its KV was computed or put back by
    `write_kv`; a token computed by `decode` differs in the last bits from the same token computed by `prefill`.

    With linear attention a row has a state as well, which is that after its last token and no other: what was put back
    by `write_kv` goes on from where `read_state` was called, once `write_state` has put that back.
    """

    def __init__(self, artifact: Artifact, *, rows: int, context_length: int, threads: int) -> None:
        self.rows = rows
        self.context_length = context_length
        self.spec = artifact.spec.decoder
        # One place more, which is where a full row that does not decode lets others' calls write.
        self._memory = KVMemory(self.spec, rows, context_length + 1)
        delta_net = self.spec.delta_net
        self._states = StateMemory(delta_net, rows) if delta_net else None
        # A call writes the states of all its rows, of those between too, though as they were: one call at a time.
        self._alone = threading.Lock() if delta_net else nullcontext()
        self._session = open_session(cpu_decoder(artifact, self._memory.capacity), artifact, threads)
        self._lengths = np.zeros(rows, np.int32)
        logits = np.empty((rows, self.spec.vocab), np.float32)
        self._decode_logits = [logits[: count + 1] for count in range(rows)]  # what is bound already costs nothing
        self._prefills: dict[int, RowBinding] = {}
        self._decodes: dict[tuple[int, int], RowBinding] = {}

    def announce(self, row: int, stop: int) -> None:
        """Say before a step that `row` will be filled up to `stop`.

        Its `prefill` may then run on another thread, beside those of other rows and one `decode`, which writes what
        nobody reads to the rows between its own, behind their last token.
        """
        self._lengths[row] = stop

    def prefill(
        self,
        row: int,
        start: int,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        features: NDArray[np.float32],
        feature_index: NDArray[np.int64],
        *,
        logits: Logits,
    ) -> NDArray[np.float32]:
        """Compute `token_ids` [T] at `positions` [axes, T] and write their KV to [start, start + T) of `row`.

        `feature_index` [T] names the row of `features` [F, hidden] that replaces the token's embedding, -1 none.
        Plain rotary embedding takes a token's place in the row as its position and does not read `positions`.
        Where an image's tokens attend to each other both ways, a call has text, or one image to its last token: whoever
        cuts an image, or mixes it with text, gets another model's logits. The latter raises ValueError.
        Returns logits of the last token [1, vocab], of none [0, vocab], or of all [T, vocab].
        Raises ValueError for places outside the row.
        """
        count = len(token_ids)
        if not (count and start >= 0 and start + count <= self.context_length):
            raise ValueError(f"places {start} to {start + count} of a row of {self.context_length}")
        replaced = np.flatnonzero(feature_index >= 0)
        if self.spec.mutual_images and 0 < len(replaced) < count:
            raise ValueError(f"{len(replaced)} tokens of an image in one call with {count - len(replaced)} of text")
        ids = token_ids.astype(np.int64)
        ids[replaced] = 0
        # Products of one row sum in another order than those of several. The last token is given once more; that lands
        # behind the chunk, where the next one will overwrite it.
        given = np.minimum(np.arange(max(2, count)), count - 1)
        self.announce(row, start + count)
        binding = self._prefills.get(row)
        if binding is None:
            binding = self._prefills[row] = RowBinding(self._session, self.spec, self._memory, self._states, row, 1)
        binding.prefill(
            ids[given],
            replaced,
            np.ascontiguousarray(features[feature_index[replaced]], np.float32),
            np.take(positions, given, axis=1),
            start + len(given) - 1,
            count,
            # A single token sees everything before it either way, and its repetition must not be seen.
            is_image=self.spec.mutual_images and len(replaced) == count > 1,
        )
        with self._alone:
            if self._states is not None and start == 0:
                self._states.clear(row)
            wanted = np.arange(count) if logits == "all" else np.array([count - 1])
            result = binding.logits(wanted, np.empty((len(wanted), self.spec.vocab), np.float32))
        return result if logits else result[:0]

    def decode(
        self,
        rows: Sequence[int],
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """One token [B] for each of `rows`, at `positions` [axes or 1, B], after the `lengths` [B] tokens in the row.

        One call for the rows from the lowest to the highest: those between that do not decode take part with a token
        that lands behind their last. Returns logits [B, vocab], which the next call of as many overwrites. Raises
        ValueError for a row that is full.
        """
        if lengths.max() >= self.context_length:
            raise ValueError(f"a row of {self.context_length} tokens is full")
        chosen = np.asarray(rows, np.int64)
        first, count = int(chosen.min()), int(chosen.max() - chosen.min()) + 1
        places = chosen - first
        binding = self._decode_binding(first, count)
        self._lengths[chosen] = lengths.astype(np.int32)  # numpy lets go of the interpreter to convert on the way
        binding.decode(places, token_ids, positions, self._lengths[first : first + count])
        with self._alone:
            result = binding.logits(places, self._decode_logits[len(rows) - 1])
        self._lengths[chosen] += 1
        return result

    def read_kv(self, row: int, start: int, stop: int) -> NDArray[np.float32]:
        """A copy [layers, 2, kv_heads, stop - start, head_dim]."""
        return self._memory.read(row, start, stop)

    def write_kv(self, row: int, start: int, kv: NDArray[np.float32]) -> None:
        """Put back what `read_kv` gave; the row then holds start + kv.shape[3] tokens."""
        stop = start + kv.shape[3]
        if stop > self.context_length:
            raise ValueError(f"places {start} to {stop} of a row of {self.context_length}")
        self._memory.write(row, start, kv)
        self._lengths[row] = stop

    def read_state(self, row: int) -> NDArray[np.float32]:
        """A copy of what linear attention keeps of the row's tokens, one axis; empty for a decoder without it."""
        return self._states.read(row) if self._states else np.empty(0, np.float32)

    def write_state(self, row: int, state: NDArray[np.float32]) -> None:
        """Put back what `read_state` gave, beside the KV of as many tokens as there were then."""
        if self._states is not None:
            self._states.write(row, state)

    def release(self, row: int) -> None:
        """Empty the row and give its memory back, unless it is too little to be worth the system calls."""
        if int(self._lengths[row]) * self.spec.kv_bytes_per_token > _KEPT_BYTES:
            self._memory.release(row)
        if self._states is not None and self._states.row_bytes > _KEPT_BYTES:
            self._states.release(row)
        self._lengths[row] = 0

    def _decode_binding(self, first: int, count: int) -> RowBinding:
        binding = self._decodes.pop((first, count), None)
        if binding is None:
            binding = RowBinding(self._session, self.spec, self._memory, self._states, first, count)
            if len(self._decodes) >= _BINDINGS:
                del self._decodes[next(iter(self._decodes))]
        self._decodes[first, count] = binding  # last in order of use
        return binding
