"""Queries, keys and values on their way to attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from engine.graphs.builder import MICROSOFT
from engine.graphs.cuda.weights import CudaBuilder
from engine.graphs.rotary import rotary_tables
from engine.spec import DecoderSpec


class Heads:
    """Each method takes and gives [T, heads * head_dim]."""

    def __init__(self, builder: CudaBuilder, spec: DecoderSpec, positions: int) -> None:
        self._builder = builder
        self._spec = spec
        dtype = builder.dtype.type
        self._tables = rotary_tables(builder, spec.rope, positions, dtype)
        if spec.sliding:
            self._sliding_tables = rotary_tables(builder, spec.sliding.rope, positions, dtype, "sliding_rotary")

    def tables(self, layer: int) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine of positions below `positions`, [positions, head_dim / 2]."""
        return self._sliding_tables if self._spec.window(layer) else self._tables

    def split(self, packed: ir.Value) -> Sequence[ir.Value]:
        """Queries, keys and values, which lie side by side."""
        spec = self._spec
        widths = [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
        return self._builder.ops("Split", packed, self._builder.constant(widths, np.int64), outputs=3, axis=-1)

    def split_gated(self, packed: ir.Value) -> tuple[Sequence[ir.Value], ir.Value | None]:
        """As `split`, and gates [T, heads * head_dim] if there are any; each lies behind its head's queries."""
        spec, builder = self._spec, self._builder
        if not spec.attention_gate:
            return self.split(packed), None
        width, key_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        widths = builder.constant([2 * width, key_width, key_width], np.int64)
        both, key, value = builder.ops("Split", packed, widths, outputs=3, axis=-1)
        pairs = builder.reshape(both, -1, spec.heads, 2, spec.head_dim)
        query, gate = (
            builder.reshape(part, -1, width) for part in builder.ops("Split", pairs, outputs=2, axis=2, num_outputs=2)
        )
        return (query, key, value), gate

    def gated(self, output: ir.Value, gate: ir.Value | None) -> ir.Value:
        """Attention's output [T, heads * head_dim], through the gates that `split_gated` found."""
        builder = self._builder
        return output if gate is None else builder.op("Mul", output, builder.op("Sigmoid", gate))

    def norm_weights(self, layer: int) -> tuple[ir.Value, ir.Value] | tuple[None, None]:
        """Of queries and keys, if the model norms them."""
        if not self._spec.qk_norm:
            return None, None
        query, key = (self._builder.device_weight(f"layers.{layer}.{part}_norm.weight") for part in ("query", "key"))
        return query, key

    def norm(self, x: ir.Value, heads: int, weight: ir.Value | None) -> ir.Value:
        """RMS norm over each head; x itself without a weight."""
        if weight is None:
            return x
        builder, spec = self._builder, self._spec
        rows = builder.reshape(x, -1, spec.head_dim)
        normed = builder.op("SimplifiedLayerNormalization", rows, weight, axis=-1, epsilon=spec.norm_eps)
        return builder.reshape(normed, -1, heads * spec.head_dim)

    def rotate(self, x: ir.Value, heads: int, positions: ir.Value, layer: int) -> ir.Value:
        """By positions int64 [3, 1, T] or [1, T]."""
        builder, rope = self._builder, self._spec.rope
        width = heads * self._spec.head_dim
        batch = builder.reshape(x, 1, -1, width)
        turns_whole = rope.width == self._spec.head_dim
        if rope.axes == 1:
            assert turns_whole, "This is a bug: heads of which a part turns have three axes."
            rotated = builder.op("RotaryEmbedding", batch, positions, *self.tables(layer), domain=MICROSOFT)
        else:
            rotated = builder.op(
                *("MRotaryEmbedding", batch, positions, *self.tables(layer)),
                domain=MICROSOFT,
                mrope_section=rope.mrope_section,
                mrope_layout=int(rope.mrope_interleaved),
                num_heads=heads,
                rotary_embedding_dim=0 if turns_whole else rope.width,
            )
        return builder.reshape(rotated, -1, width)
