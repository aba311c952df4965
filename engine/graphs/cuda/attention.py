"""Attention in 16 bits: one operator that rotates, writes the cache and attends."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.graphs.builder import MICROSOFT, Attribute
from engine.graphs.cuda.heads import Heads
from engine.graphs.cuda.inputs import PARTS, StepInputs
from engine.graphs.cuda.weights import CudaBuilder
from engine.spec import DecoderSpec


class Caches:
    """KV memory of all layers: inputs, and outputs that are the same memory."""

    def __init__(self, builder: CudaBuilder, spec: DecoderSpec, *, int8: bool = False) -> None:
        self._builder = builder
        self._int8 = int8
        self._dtype = np.int8 if int8 else builder.dtype.type
        self._shape = ("blocks", "block_size", spec.kv_heads, spec.head_dim)
        self._written: list[tuple[str, ir.Value]] = []

    def input(self, part: str, layer: int) -> ir.Value:
        return self._builder.input(StepInputs.cache(part, layer), self._dtype, self._shape)

    def scale(self, part: str, layer: int) -> ir.Value | None:
        """What 1 in a cache of int8 stands for; none in one of activations."""
        if not self._int8:
            return None
        shape = (self._shape[2], 1, self._shape[3])
        return self._builder.input(StepInputs.cache_scale(part, layer), np.float32, shape)

    def written(self, part: str, layer: int, value: ir.Value) -> None:
        self._written.append((StepInputs.cache_out(part, layer), value))

    def output(self) -> None:
        """Declare them as the graph's next outputs."""
        for name, value in self._written:
            self._builder.output(value, name, self._dtype)


class PagedAttention:
    """One node per layer for all sequences of a step, prefilling or decoding."""

    def __init__(
        self, builder: CudaBuilder, spec: DecoderSpec, positions: int, *, int8_cache: bool, mutual: bool = False
    ) -> None:
        """`mutual`: the new tokens of a sequence attend to each other in both directions."""
        self._builder = builder
        self._spec = spec
        self._heads = Heads(builder, spec, positions)
        self.starts = builder.input(StepInputs.STARTS, np.int32, ["B1"])
        self._past = builder.input(StepInputs.PAST, np.int32, ["B"])
        self._blocks = builder.input(StepInputs.BLOCK_TABLE, np.int32, ["B", "M"])
        self._bounds = builder.input(StepInputs.BOUNDS, np.int32, [3])
        self._positions = self._position_input() if spec.rope.axes == 3 else None
        self._caches = Caches(builder, spec, int8=int8_cache)
        self._int8_cache = int8_cache
        self._mutual = mutual

    def attend(self, qkv: ir.Value, layer: int) -> ir.Value:
        """[T, (heads + 2 * kv_heads) * head_dim], and gates if there are any, to [T, heads * head_dim]."""
        builder, spec = self._builder, self._spec
        rotate_inside = self._positions is None
        inputs: tuple[ir.Value | None, ...] = (qkv, None, None)
        gate = None
        if not rotate_inside:
            inputs, gate = self._rotated(qkv, layer)
        assert gate is not None or not spec.attention_gate, "This is a bug: a gate, and rotation by the operator."
        caches = [self._caches.input(part, layer) for part in PARTS]
        norms = self._heads.norm_weights(layer)
        output, *written = builder.ops(
            "PagedAttention",
            *(*inputs, *caches, self.starts, self._past, self._blocks),
            *(self._heads.tables(layer) if rotate_inside else (None, None)),
            *(None, None),  # slot mapping, head sink
            *(norms if rotate_inside else (None, None)),
            *(self._caches.scale(part, layer) for part in PARTS),
            self._bounds,
            outputs=3,
            domain=MICROSOFT,
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            do_rotary=int(rotate_inside),
            qk_norm_epsilon=spec.norm_eps,
            **{f"{part}_quant_type": "PER_CHANNEL" if self._int8_cache else "NONE" for part in "kv"},
            **self._mask(layer),
        )
        for part, value in zip(PARTS, written, strict=True):
            self._caches.written(part, layer, value)
        return self._heads.gated(output, gate)

    def output_cache(self) -> None:
        """Declare the caches as outputs, after the logits."""
        self._caches.output()

    def _mask(self, layer: int) -> dict[str, Attribute]:
        """What differs from the operator's defaults; the window bounds what lies before a token, mutual or not."""
        spec, attributes = self._spec, dict[str, Attribute]()
        if spec.query_scalar:
            attributes["scale"] = spec.score_scale
        if window := spec.window(layer):
            attributes["local_window_size"] = window
        if self._mutual:
            attributes["is_causal"] = 0
        return attributes

    def _position_input(self) -> ir.Value:
        """[3, 1, T] of the type that MRotaryEmbedding takes."""
        builder = self._builder
        positions = builder.input(StepInputs.POSITIONS, np.int32, [3, "T"])
        return builder.op("Cast", builder.reshape(positions, 3, 1, -1), to=int(ir.DataType.INT64))

    def _rotated(self, qkv: ir.Value, layer: int) -> tuple[tuple[ir.Value, ir.Value, ir.Value], ir.Value | None]:
        """Three-axis rotary embedding, which the operator does not do itself, and the norm that comes before it.

        Queries, keys and values, and the gates.
        """
        heads, spec, positions = self._heads, self._spec, self._positions
        assert positions is not None
        (query, key, value), gate = heads.split_gated(qkv)
        query_norm, key_norm = heads.norm_weights(layer)
        query = heads.rotate(heads.norm(query, spec.heads, query_norm), spec.heads, positions, layer)
        key = heads.rotate(heads.norm(key, spec.kv_heads, key_norm), spec.kv_heads, positions, layer)
        return (query, key, value), gate
