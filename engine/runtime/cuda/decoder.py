"""Runs the decoder on a device: packed steps over paged KV memory, decode steps from captured graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.graphs.cuda import PARTS, StepInputs
from engine.runtime.cuda.buckets import Bucket, Buckets
from engine.runtime.cuda.parts import StepPart, parts_of
from engine.runtime.cuda.pieces import SIZES, CapturedPieces
from engine.runtime.cuda.session import Binding, GraphSession
from engine.runtime.cuda.states import DeltaNetStates
from engine.runtime.cuda.step import Int32, PackedStep, Placement, StepBuffer
from engine.runtime.cuda.unfused import unfused_parts, unfused_size
from engine.spec import DecoderSpec

Result = tuple[torch.Tensor, torch.Tensor]
"""Logits [R, vocab], and the slots [R] int32 that they are for."""


@dataclass(slots=True, eq=False)
class _Replayed:
    """A decode step that may go on. `left` steps on, the longest sequence will be too long for its graph."""

    bucket: Bucket
    result: Result
    left: int
    increments: Int32 | None = None


class PagedDecoder:
    """One session, its KV blocks, and a captured graph for every bucket. One thread.

    Block 0 of the caches belongs to no sequence: rows that fill up a bucket write there. With linear attention a step's
    sequences have their `states` in the first rows, in the step's order.

    A graph whose attention is not paged runs operator by operator, without captured graphs: what it needs of memory
    grows with the bucket's context, and it is there to compare with.
    """

    def __init__(
        self,
        session: GraphSession,
        spec: DecoderSpec,
        slot_tokens: torch.Tensor,
        *,
        dtype: torch.dtype,
        blocks: int,
        block_size: int,
        slots: int,
        context_length: int,
        step_tokens: int,
        paged: bool = True,
        pieces: Sequence[int] = SIZES,
        in_parts: bool = False,
        cache_scales: Mapping[str, torch.Tensor] | None = None,
        decoding: GraphSession | None = None,
        mutual: GraphSession | None = None,
        states: DeltaNetStates | None = None,
    ) -> None:
        """`blocks` counts block 0; `step_tokens` is the most new tokens of one call; `paged` as the graph was made.
        Prompts' pieces of the sizes `pieces` are captured; `in_parts` runs steps of several sequences from those graphs
        as well. `cache_scales` are the inputs `StepInputs.cache_scale` of a
        graph with int8 caches. `decoding` runs the captured steps, in a graph for decoding; `mutual` those steps, where
        the model has any. `states` are those that linear attention needs, made here unless they are given.

        `slot_tokens` int32 [slots + 1] holds the token that was last chosen for each slot.
        """
        device = slot_tokens.device
        self._session = session
        self._decoding = decoding or session
        self._mutual = mutual
        self.spec = spec
        self._paged = paged
        self._block_size = block_size
        self.buckets = Buckets(slots, context_length)
        shape = (blocks, block_size, spec.kv_heads, spec.head_dim)
        self._caches = {
            StepInputs.cache(part, layer): torch.zeros(
                shape, dtype=torch.int8 if cache_scales else dtype, device=device
            )
            for layer in spec.attention_layers
            for part in PARTS
        }
        if states is None and spec.delta_net is not None:
            states = DeltaNetStates(spec.delta_net, slots, dtype, device)
        self.states = states
        self._cache_scales = dict(cache_scales or {})
        self._logits = torch.zeros((slots, spec.vocab), dtype=dtype, device=device)
        self._no_features = torch.zeros((1, spec.feature_width), dtype=dtype, device=device)
        self._slot_tokens = slot_tokens
        table = slots * -(-context_length // block_size)
        self._step_tokens = step_tokens
        size = 8 * step_tokens + 8 * slots + table + 64
        size += 0 if paged else unfused_size(step_tokens, slots, context_length)
        self._buffer = StepBuffer(size, device)
        self._last: _Replayed | None = None
        self._captured: dict[Bucket, tuple[Placement, Binding, torch.Tensor]] = {}
        self._packed_bindings: dict[GraphSession, Binding] = {}
        self._piece_sizes = pieces
        self._pieces: CapturedPieces | None = None  # once they are captured
        self._joined: Result | None = None
        if in_parts:
            self._joined = torch.zeros_like(self._logits), torch.zeros(slots, dtype=torch.int32, device=device)
        self._context_length = context_length
        self._graphs = {bucket: number for number, bucket in enumerate(self.buckets, 1)}

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self._logits.dtype

    @property
    def kv_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches.values())

    def run(self, step: PackedStep) -> Result:
        """Enqueue a step; what it gives is there until the next."""
        self._last = None
        if self.states is not None:
            self.states.clear(np.flatnonzero(step.past == 0).tolist())
        if step.is_decode and self._paged and self._is_captured(step):
            return self._decode(step)
        if self._pieces is not None and self._pieces.takes(step):
            return self._logits[: len(step.slots)], self._pieces.run(step)
        if self._pieces is not None and self._joined is not None and (parts := parts_of(step, self._pieces.takes)):
            return self._in_parts(parts, self._joined, len(step.slots))
        return self._packed(step)

    def _in_parts(self, parts: Sequence[StepPart], joined: Result, rows: int) -> Result:
        """Each from its graph; all of these write the first rows of the same logits, so these are copied away."""
        for part, first in parts:
            for whole, given in zip(joined, self.run(part), strict=True):
                whole[first : first + len(given)].copy_(given)
        self._last = None  # not a step that could go on
        return joined[0][:rows], joined[1][:rows]

    def go_on(self) -> Result | None:
        """Enqueue the last step again, with each of its sequences a token further.

        None if that was no decode step, or needs another graph: then `run` does it.
        """
        last = self._last
        if last is None or not last.left:
            return None
        last.left -= 1
        place, binding, _ = self._captured[last.bucket]
        if last.increments is None:
            changing = [name for name in (StepInputs.PAST, StepInputs.POSITIONS) if name in place.starts]
            last.increments = place.increments(changing, len(last.result[0]))
        place.go_on(last.increments)
        self._decoding.run(binding, self._graphs[last.bucket])
        return last.result

    def capture(self) -> None:
        """Record all graphs, with rows that write to block 0. States of sequences do not survive it."""
        if not self._paged:
            return
        for bucket in self.buckets:
            self._replay(bucket, _stand_in(bucket, self.spec.rope.axes))
        if self._piece_sizes and self.states is None and not self._cache_scales:
            self._pieces = self._captured_pieces()
            self._pieces.capture()

    def _captured_pieces(self) -> CapturedPieces:
        """For models without states, which capturing would write, and caches that prefill need not widen."""
        return CapturedPieces(
            self._session,
            lambda inputs, features: self._bind(self._session, inputs, features, 1, 2),
            self._buffer,
            sizes=self._piece_sizes,
            axes=self.spec.rope.axes,
            block_size=self._block_size,
            step_tokens=self._step_tokens,
            context_length=self._context_length,
            feature_width=self.spec.feature_width,
            dtype=self.dtype,
        )

    def rehearse(self) -> None:
        """Run the largest prefill step there can be, so that the working memory it takes is taken."""
        total, longest = self._step_tokens, min(self._step_tokens, self.spec.context_length)
        starts = np.arange(0, total, longest, dtype=np.int32)  # one sequence, unless it would be too long for the model
        counts = np.diff(starts, append=np.int32(total))
        positions = np.broadcast_to(np.arange(total, dtype=np.int32) % longest, (self.spec.rope.axes, total))
        tables = np.zeros((len(starts), -(-longest // self._block_size)), np.int32)
        ids, zero = np.zeros(total, np.int32), np.zeros(1, np.int32)
        step = PackedStep(ids, positions, counts, np.zeros_like(counts), tables, zero, zero)
        self.run(step)
        if self._mutual is not None:  # a session takes memory of its own
            self.run(replace(step, mutual=True))

    def cached(self, part: str, layer: int, table: Int32, tokens: int) -> torch.Tensor:
        """What the cache holds of a sequence's first tokens, [tokens, kv_heads, head_dim]; `table` has their blocks."""
        blocks = torch.from_numpy(table.astype(np.int64)).to(self._slot_tokens.device)
        return self._caches[StepInputs.cache(part, layer)][blocks].flatten(0, 1)[:tokens]

    def close(self) -> None:
        """Let go of the session, its graphs and bindings, and KV memory; nothing runs afterwards."""
        self._captured.clear()
        self._packed_bindings.clear()
        if self._pieces is not None:
            self._pieces.close()
        self._caches.clear()
        self.states = None
        del self._session, self._decoding, self._mutual

    def _is_captured(self, step: PackedStep) -> bool:
        """Whether a graph may be replayed: what fills up its bucket writes states, which must be nobody's.

        To capture one would compute the step several times, and a state is written where it was read.
        """
        if self.states is None:
            return True
        bucket = self.buckets.find(len(step.ids), step.longest)
        return bucket in self._captured and self.states.free_from(len(step.ids), bucket.batch)

    def _decode(self, step: PackedStep) -> Result:
        bucket = self.buckets.find(len(step.ids), step.longest)
        slots = self._replay(bucket, step)
        count = len(step.slots)
        result = self._logits[:count], slots[:count]
        if self.states is None:  # which have to be looked at before every step
            self._last = _Replayed(bucket, result, bucket.context - step.longest)
        return result

    def _replay(self, bucket: Bucket, step: PackedStep) -> torch.Tensor:
        """The slots on the device. Rows behind the last sequence compute slot 0's token at place 0 of block 0."""
        place, binding, slots = self._captured_bucket(bucket)
        parts = {
            StepInputs.IDS: step.ids,
            StepInputs.PAST: step.past,
            StepInputs.BLOCK_TABLE: step.tables[:, : self._columns(bucket)],
            StepInputs.SLOTS: step.slots,
        }
        if self.spec.rope.axes == 3:
            parts[StepInputs.POSITIONS] = step.positions
        place.upload(parts)
        if step.ids.max() >= 0:
            self._choose(place.view(StepInputs.IDS)[: len(step.ids)], slots[: len(step.ids)])
        self._decoding.run(binding, self._graphs[bucket])
        return slots

    def _choose(self, ids: torch.Tensor, slots: torch.Tensor) -> None:
        """Tokens that the host knows become the last of their slots: a prompt's last one may be alone in a step."""
        places = slots.long()
        self._slot_tokens.index_copy_(0, places, torch.where(ids < 0, self._slot_tokens[places], ids))

    def _captured_bucket(self, bucket: Bucket) -> tuple[Placement, Binding, torch.Tensor]:
        if bucket not in self._captured:
            self._captured[bucket] = self._bind_bucket(bucket)
        return self._captured[bucket]

    def _bind_bucket(self, bucket: Bucket) -> tuple[Placement, Binding, torch.Tensor]:
        """What changes from step to step, and what never does: one token for each of `batch` sequences."""
        batch, device = bucket.batch, self._slot_tokens.device
        place = self._buffer.place(self._shapes(bucket))
        order = torch.arange(batch + 1, dtype=torch.int32, device=device)
        inputs = {name: place.view(name) for name in place.starts} | {
            StepInputs.STARTS: order,
            StepInputs.LOGITS_ROWS: order[:batch],
            StepInputs.FEATURE_INDEX: torch.full((batch,), -1, dtype=torch.int32, device=device),
            StepInputs.BOUNDS: torch.tensor([1, bucket.context, bucket.shorter + 1], dtype=torch.int32),
        }
        binding = self._bind(self._decoding, inputs, self._no_features, batch, batch)
        return place, binding, place.view(StepInputs.SLOTS)

    def _packed(self, step: PackedStep) -> Result:
        columns = -(-step.longest // self._block_size)
        # The head runs over one row at least.
        rows = step.logits_rows if len(step.logits_rows) else np.zeros(1, np.int32)
        no_image = np.full(len(step.ids), -1, np.int32)
        parts = {
            StepInputs.IDS: step.ids,
            StepInputs.BLOCK_TABLE: step.tables[:, :columns],
            StepInputs.LOGITS_ROWS: rows,
            StepInputs.FEATURE_INDEX: no_image if step.feature_index is None else step.feature_index,
            StepInputs.SLOTS: step.slots,
        }
        if self.spec.rope.axes == 3:
            parts[StepInputs.POSITIONS] = step.positions
        host_inputs: dict[str, torch.Tensor] = {}
        if self._paged:
            parts[StepInputs.PAST] = step.past
            bounds = [int(step.counts.max()), step.longest, step.longest]
            host_inputs[StepInputs.BOUNDS] = torch.tensor(bounds, dtype=torch.int32)
        else:
            parts |= unfused_parts(step, columns, self._block_size)
        if self._paged or self.states is not None:
            parts[StepInputs.STARTS] = np.concatenate([[0], np.cumsum(step.counts)]).astype(np.int32)
        place = self._buffer.place({name: part.shape for name, part in parts.items()})
        place.upload(parts)
        inputs = {name: place.view(name) for name in parts if name != StepInputs.SLOTS}
        features = self._no_features if step.features is None else step.features
        session = self._mutual if step.mutual else self._session
        assert session is not None, "This is a bug: a step of images that see themselves, for a model that has none."
        bound = (inputs | host_inputs, features, len(rows), len(step.counts))
        binding = self._bind(session, *bound, reuse=self._packed_bindings.get(session))
        self._packed_bindings[session] = binding
        session.run(binding)
        return self._logits[: len(step.slots)], place.view(StepInputs.SLOTS)

    def _shapes(self, bucket: Bucket) -> dict[str, tuple[int, ...]]:
        """Of what changes from one decode step to the next."""
        batch = bucket.batch
        shapes: dict[str, tuple[int, ...]] = {
            StepInputs.IDS: (batch,),
            StepInputs.PAST: (batch,),
            StepInputs.BLOCK_TABLE: (batch, self._columns(bucket)),
            StepInputs.SLOTS: (batch,),
        }
        return shapes | ({StepInputs.POSITIONS: (3, batch)} if self.spec.rope.axes == 3 else {})

    def _bind(
        self,
        session: GraphSession,
        inputs: dict[str, torch.Tensor],
        features: torch.Tensor,
        rows: int,
        sequences: int,
        *,
        reuse: Binding | None = None,
    ) -> Binding:
        shared = {StepInputs.SLOT_TOKENS: self._slot_tokens, StepInputs.FEATURES: features} | self._cache_scales
        written = {
            StepInputs.cache_out(part, layer): self._caches[StepInputs.cache(part, layer)]
            for layer in self.spec.attention_layers
            for part in PARTS
        }
        states, after = self.states.bound(sequences) if self.states is not None else ({}, {})
        outputs = {StepInputs.LOGITS: self._logits[:rows]} | written | after
        return session.bind(inputs | shared | self._caches | states, outputs, reuse)

    def _columns(self, bucket: Bucket) -> int:
        return -(-bucket.context // self._block_size)


def _stand_in(bucket: Bucket, axes: int) -> PackedStep:
    """One sequence that belongs to the bucket, in block 0 from beginning to end."""
    zero, table = np.zeros(1, np.int32), np.zeros((1, 1), np.int32)
    past = np.full(1, bucket.shorter, np.int32)
    return PackedStep(zero, np.zeros((axes, 1), np.int32), zero + 1, past, table, zero, zero)
