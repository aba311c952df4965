"""Attention in fp32, for which the fused operator has no kernel: plain operators, for comparison."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.graphs.cuda.attention import Caches
from engine.graphs.cuda.heads import Heads
from engine.graphs.cuda.inputs import PARTS, StepInputs, UnfusedInputs
from engine.graphs.cuda.weights import CudaBuilder
from engine.spec import DecoderSpec

_MASKED = -1e30  # finite, so that a row with every key masked is not 0 / 0


class UnfusedAttention:
    """Queries are padded to one batch, keys gathered from their blocks, and scores of all pairs computed.

    Takes memory for B * S * L * heads scores, S being the most new tokens of any sequence and L the places in the
    blocks of the longest.
    """

    def __init__(self, builder: CudaBuilder, spec: DecoderSpec, positions: int, *, mutual: bool = False) -> None:
        """`mutual` as `PagedAttention` has it."""
        self._mutual = mutual
        self._builder = builder
        self._spec = spec
        self._heads = Heads(builder, spec, positions)
        self._caches = Caches(builder, spec)
        self._blocks = builder.input(StepInputs.BLOCK_TABLE, np.int32, ["B", "M"])
        self._queries = builder.input(UnfusedInputs.QUERIES, np.int32, ["B", "S"])
        self._unpadded = builder.input(UnfusedInputs.UNPADDED, np.int32, ["T"])
        self._written = self._int64(builder.input(UnfusedInputs.WRITTEN, np.int32, ["T", 2]))
        places = builder.input(UnfusedInputs.PLACES, np.int32, ["T"])
        self._positions = self._position_input(places)
        self._seen, self._seen_in_window, self._valid = self._masks(places)

    def attend(self, qkv: ir.Value, layer: int) -> ir.Value:
        """[T, (heads + 2 * kv_heads) * head_dim], and gates if there are any, to [T, heads * head_dim]."""
        builder, spec, heads = self._builder, self._spec, self._heads
        (query, key, value), gate = heads.split_gated(qkv)
        query_norm, key_norm = heads.norm_weights(layer)
        query = heads.rotate(heads.norm(query, spec.heads, query_norm), spec.heads, self._positions, layer)
        key = heads.rotate(heads.norm(key, spec.kv_heads, key_norm), spec.kv_heads, self._positions, layer)
        keys, values = (self._write(x, part, layer) for x, part in zip((key, value), PARTS, strict=True))
        scale = builder.constant(spec.score_scale, np.float32)
        scores = builder.op("MatMul", builder.op("Mul", self._padded(query), scale), self._by_head(keys, [0, 2, 3, 1]))
        seen = self._seen_in_window if spec.window(layer) else self._seen
        scores = builder.op("Where", seen, scores, builder.constant(_MASKED, np.float32))
        # Memory that nobody wrote, or somebody else did, may hold what is not a number; its weight is zero.
        values = builder.op("Where", self._valid, values, builder.constant(0, np.float32))
        mixed = builder.op("MatMul", builder.op("Softmax", scores, axis=-1), self._by_head(values, [0, 2, 1, 3]))
        rows = builder.op("Transpose", mixed, perm=[0, 3, 1, 2, 4])
        rows = builder.reshape(rows, -1, spec.heads * spec.head_dim)
        return heads.gated(builder.op("Gather", rows, self._unpadded, axis=0), gate)

    def output_cache(self) -> None:
        """Declare the caches as outputs, after the logits."""
        self._caches.output()

    def _write(self, x: ir.Value, part: str, layer: int) -> ir.Value:
        """Put [T, kv_heads * head_dim] into the cache; all that each sequence has then, [B, L, kv_heads, head_dim].

        The operator writes where its input is when its output is bound to the same memory.
        """
        builder, shape = self._builder, (self._spec.kv_heads, self._spec.head_dim)
        cache = self._caches.input(part, layer)
        written = builder.op("ScatterND", cache, self._written, builder.reshape(x, -1, *shape))
        self._caches.written(part, layer, written)
        return builder.reshape(builder.op("Gather", written, self._blocks, axis=0), 0, -1, *shape)

    def _padded(self, query: ir.Value) -> ir.Value:
        """[B, kv_heads, heads / kv_heads, S, head_dim]."""
        builder, spec = self._builder, self._spec
        batch = builder.op("Gather", query, self._queries, axis=0)
        grouped = builder.reshape(batch, 0, 0, spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim)
        return builder.op("Transpose", grouped, perm=[0, 2, 3, 1, 4])

    def _by_head(self, x: ir.Value, order: list[int]) -> ir.Value:
        """One matrix for each sequence and head, and one place that stands for the queries that share it."""
        builder = self._builder
        return builder.op("Unsqueeze", builder.op("Transpose", x, perm=order), builder.constant([2], np.int64))

    def _masks(self, places: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Which keys a query sees, [B, 1, 1, S, L], also in sliding layers, and which a sequence has, [B, L, 1, 1]."""
        builder = self._builder
        keys = builder.input(UnfusedInputs.KEY_PLACES, np.int32, ["L"])
        lengths = builder.input(UnfusedInputs.LENGTHS, np.int32, ["B"])
        queries = builder.op("Gather", places, self._queries, axis=0)
        queries = builder.op("Unsqueeze", queries, builder.constant([1, 2, 4], np.int64))
        valid = builder.op("Less", keys, builder.reshape(lengths, -1, 1))
        seen = builder.op("LessOrEqual", keys, queries)
        if self._mutual:
            seen = builder.op("Unsqueeze", valid, builder.constant([1, 2, 3], np.int64))
        in_window = seen
        if self._spec.sliding:
            first = builder.op("Sub", queries, builder.constant(self._spec.sliding.window, np.int32))
            in_window = builder.op("And", seen, builder.op("Greater", keys, first))
        return (
            seen,
            in_window,
            builder.op("Unsqueeze", valid, builder.constant([2, 3], np.int64)),
        )

    def _position_input(self, places: ir.Value) -> ir.Value:
        """[3, 1, T], or [1, T] if a token's position is its place."""
        if self._spec.rope.axes == 1:
            return self._int64(self._builder.reshape(places, 1, -1))
        positions = self._builder.input(StepInputs.POSITIONS, np.int32, [3, "T"])
        return self._int64(self._builder.reshape(positions, 3, 1, -1))

    def _int64(self, x: ir.Value) -> ir.Value:
        return self._builder.op("Cast", x, to=int(ir.DataType.INT64))
