"""The decoder on the CPU: GroupQueryAttention over KV slabs that the runtime owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from engine.checkpoints.artifact import Artifact
from engine.graphs.builder import MICROSOFT, GraphBuilder
from engine.graphs.cpu.delta_net import CpuDeltaNet
from engine.graphs.cpu.linear import linears
from engine.graphs.decoder import decoder_graph, scaled_embedding, softcapped
from engine.graphs.dialect import Residual
from engine.graphs.rotary import rotary_tables
from engine.spec import DecoderSpec, RopeSpec


class DecoderInputs:
    """Names in the graph. B sequences of S tokens, T = B * S."""

    IDS = "ids"  # int64 [T]: tokens
    FEATURE_ROWS = "feature_rows"  # int64 [F, 1]: tokens whose embedding is replaced
    FEATURE_VALUES = "feature_values"  # float32 [F, feature_width]
    LOGITS_ROWS = "logits_rows"  # int64 [R], R > 0
    SHAPE = "shape"  # int64 [3]: B, S, -1
    LAST = "last"  # int32 [B]: place of a sequence's last token, counted from 0
    LONGEST = "longest"  # int32 []: the most tokens of any sequence
    POSITIONS = "positions"  # int64 [3, B, S]; only for three-axis rotary embedding
    IS_IMAGE = "is_image"  # bool []: the tokens are one image's; only for models whose images are mutual, as
    IMAGE_WINDOW = "image_window"  # float32 [1, 1, S, all tokens]: what sliding layers add to an image's scores
    LOGITS = "logits"  # float32 [R, vocab]

    @staticmethod
    def past(part: str, layer: int) -> str:
        """float32 [B, kv_heads, capacity, head_dim]; `part` is key or value."""
        return f"past.{part}.{layer}"

    @staticmethod
    def present(part: str, layer: int) -> str:
        """The same memory as `past`, with the new tokens written."""
        return f"present.{part}.{layer}"


def cpu_decoder(artifact: Artifact, capacity: int) -> bytes:
    """A serialised model for sequences of up to `capacity` tokens."""
    builder = GraphBuilder(artifact)
    spec = artifact.spec.decoder
    token_ids = builder.input(DecoderInputs.IDS, np.int64, ["T"])
    feature_rows = builder.input(DecoderInputs.FEATURE_ROWS, np.int64, ["F", 1])
    feature_values = builder.input(DecoderInputs.FEATURE_VALUES, np.float32, ["F", spec.feature_width])
    rows = builder.input(DecoderInputs.LOGITS_ROWS, np.int64, ["R"])
    layers = CpuDecoderLayers(builder, artifact, feature_rows, feature_values)
    attention = CpuDecoderAttention(builder, spec, capacity)
    delta_net = CpuDeltaNet(builder, spec.delta_net, spec.norm_eps, attention.shape) if spec.delta_net else None
    logits = decoder_graph(layers, attention, spec, layers.tokens(token_ids), rows, delta_net)
    builder.output(logits, DecoderInputs.LOGITS, np.float32)
    attention.output_cache()
    if delta_net is not None:
        delta_net.output_state()
    return builder.serialise()


def rms_norm(builder: GraphBuilder, x: ir.Value, name: str, epsilon: float) -> ir.Value:
    return builder.op("SimplifiedLayerNormalization", x, builder.weight(f"{name}.weight"), axis=-1, epsilon=epsilon)


class CpuDecoderLayers:
    """Implements `DecoderLayers`."""

    def __init__(
        self, builder: GraphBuilder, artifact: Artifact, feature_rows: ir.Value, feature_values: ir.Value
    ) -> None:
        self._builder = builder
        self._linears = linears(builder, artifact.precision)
        self._model = artifact.spec
        self._spec = artifact.spec.decoder
        self._epsilon = self._spec.norm_eps
        self._feature_rows = feature_rows
        self._feature_values = feature_values

    def tokens(self, token_ids: ir.Value) -> ir.Value:
        """[T, hidden]: embeddings of tokens, and image features."""
        embedded = self._linears.embedding(token_ids, "embedding")
        embedded = scaled_embedding(self._builder, embedded, self._model, np.float32)
        return self._builder.op("ScatterND", embedded, self._feature_rows, self._features(0))

    def norm_linear(self, x: Residual, norm: str, name: str) -> ir.Value:
        return self._linears.linear(rms_norm(self._builder, x.value, norm, self._epsilon), name)

    def norm_gate(self, x: Residual, norm: str, name: str) -> ir.Value:
        gate, up = self._builder.ops("Split", self.norm_linear(x, norm, name), outputs=2, axis=-1, num_outputs=2)
        return self._builder.op("Mul", self._activated(gate), up)

    def _activated(self, gate: ir.Value) -> ir.Value:
        if self._spec.activation == "gelu_pytorch_tanh":
            return self._builder.op("Gelu", gate, approximate="tanh")
        # With alpha 1 it is x * sigmoid(x).
        return self._builder.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)

    def linear_add(self, x: ir.Value, name: str, residual: Residual, norm: str | None = None) -> None:
        value = self._linears.linear(x, name)
        if norm is not None:
            value = rms_norm(self._builder, value, norm, self._epsilon)
        # SkipSimplifiedLayerNormalization adds and norms in one node, two to four times slower on this provider.
        residual.value = self._builder.op("Add", value, residual.value)

    def add_features(self, residual: Residual, part: int) -> None:
        features = self._features(part)
        residual.value = self._builder.op("ScatterND", residual.value, self._feature_rows, features, reduction="add")

    def _features(self, part: int) -> ir.Value:
        if not self._spec.deepstack:
            return self._feature_values
        return self._builder.columns(self._feature_values, part * self._spec.hidden, (part + 1) * self._spec.hidden)

    def head(self, x: Residual, norm: str, name: str, rows: ir.Value | None) -> ir.Value:
        assert rows is not None, "This is a bug: a call has rows whose logits nobody wants."
        normed = rms_norm(self._builder, x.value, norm, self._epsilon)
        logits = self._linears.linear(self._builder.op("Gather", normed, rows, axis=0), name)
        return softcapped(self._builder, logits, self._spec, np.float32)


class CpuDecoderAttention:
    """Implements `DecoderAttention`."""

    def __init__(self, builder: GraphBuilder, spec: DecoderSpec, capacity: int) -> None:
        self._builder = builder
        self._spec = spec
        self._capacity = capacity
        self.shape = builder.input(DecoderInputs.SHAPE, np.int64, [3])
        self._last = builder.input(DecoderInputs.LAST, np.int32, ["B"])
        self._longest = builder.input(DecoderInputs.LONGEST, np.int32, [])
        rope = spec.rope
        # Where only a part of a head turns, the rest must be scaled as well: then queries are, all of it.
        self._turns_whole = rope.width == spec.head_dim
        self._positions = builder.input(DecoderInputs.POSITIONS, np.int64, [3, "B", "S"]) if rope.axes == 3 else None
        self._rotary = self._scaled_tables(rope, "rotary")
        if spec.sliding:
            self._sliding_rotary = self._scaled_tables(spec.sliding.rope, "sliding_rotary")
        # A sink adds its exponential to the sum of a softmax: this one nothing. It is there because the operator's
        # tiled kernel, half as fast for a single query, does not know sinks.
        self._sink = builder.constant([-np.inf] * spec.heads, np.float32)
        if spec.mutual_images:
            self._is_image = builder.input(DecoderInputs.IS_IMAGE, np.bool_, [])
            self._image_window = builder.input(DecoderInputs.IMAGE_WINDOW, np.float32, [1, 1, "images", "keys"])
        self._presents: list[tuple[str, ir.Value]] = []

    def _scaled_tables(self, rope: RopeSpec, name: str) -> tuple[ir.Value, ir.Value]:
        """Queries and keys carry the root of the scores' scale each, so that attention multiplies by 1.

        With any other factor MLAS does not take its kernel for a single query, and transposes all keys instead.
        """
        factor = self._spec.score_scale**0.5 if self._turns_whole else 1.0
        scaled = replace(rope, attention_scale=rope.attention_scale * factor)
        return rotary_tables(self._builder, scaled, self._capacity, np.float32, name)

    def attend(self, qkv: ir.Value, layer: int) -> ir.Value:
        builder, spec = self._builder, self._spec
        shape = ("B", spec.kv_heads, self._capacity, spec.head_dim)
        parts = ("key", "value")
        past = [builder.input(DecoderInputs.past(part, layer), np.float32, shape) for part in parts]
        packed = builder.op("Reshape", qkv, self.shape)
        packed, gate = self._without_gate(packed) if spec.attention_gate else (packed, None)
        inputs = (*self._query_key_value(packed, f"layers.{layer}"), *past, self._last, self._longest)
        window = spec.window(layer)
        rotary: tuple[ir.Value | None, ...] = self._sliding_rotary if window else self._rotary
        if self._positions is not None:  # rotated already
            rotary = (None, None)

        def causal() -> Sequence[ir.Value]:
            bias = (None, None, self._sink)
            return self._grouped_query(*inputs, *rotary, *bias, local_window_size=window or -1, causal=1)

        def mutual() -> Sequence[ir.Value]:
            """What an image's tokens, all of this call, see: everything before and each other, within the window."""
            bias = (None, self._image_window if window else None)
            return self._grouped_query(*inputs, *rotary, *bias, local_window_size=-1, causal=0)

        # Only the branch that is taken is computed: a decode step does not pay for what images need.
        attended = builder.choose(self._is_image, mutual, causal, np.float32) if spec.mutual_images else causal()
        output, *present = attended
        self._presents += zip((DecoderInputs.present(part, layer) for part in parts), present, strict=True)
        output = builder.reshape(output, -1, spec.heads * spec.head_dim)
        return output if gate is None else builder.op("Mul", output, builder.op("Sigmoid", gate))

    def _grouped_query(self, *inputs: ir.Value | None, **attributes: int) -> Sequence[ir.Value]:
        return self._builder.ops(
            "GroupQueryAttention",
            *inputs,
            outputs=3,
            domain=MICROSOFT,
            scale=1.0,
            num_heads=self._spec.heads,
            kv_num_heads=self._spec.kv_heads,
            do_rotary=int(self._positions is None),
            **attributes,
        )

    def _without_gate(self, packed: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Queries, keys and values side by side, and gates [T, heads * head_dim], which lie behind their queries."""
        builder, spec = self._builder, self._spec
        width = spec.heads * spec.head_dim
        widths = builder.constant([2 * width, 2 * spec.kv_heads * spec.head_dim], np.int64)
        both, rest = builder.ops("Split", packed, widths, outputs=2, axis=-1)
        pairs = builder.reshape(both, -1, spec.heads, 2, spec.head_dim)
        query, gate = builder.ops("Split", pairs, outputs=2, axis=2, num_outputs=2)
        query = builder.op("Reshape", query, self.shape)
        return builder.op("Concat", query, rest, axis=-1), builder.reshape(gate, -1, width)

    def _query_key_value(
        self, packed: ir.Value, layer: str
    ) -> tuple[ir.Value, ir.Value, ir.Value] | tuple[ir.Value, None, None]:
        """[B, S, heads * head_dim] each, or side by side where nothing is to be done that the operator does not do."""
        builder, spec = self._builder, self._spec
        if not spec.qk_norm and self._positions is None:
            return packed, None, None
        widths = [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
        query, key, value = builder.ops("Split", packed, builder.constant(widths, np.int64), outputs=3, axis=-1)
        if spec.qk_norm:
            query, key = self._head_norm(query, f"{layer}.query_norm"), self._head_norm(key, f"{layer}.key_norm")
        if self._positions is not None:
            query, key = self._rotate(query, spec.heads), self._rotate(key, spec.kv_heads)
        if not self._turns_whole:
            query = builder.op("Mul", query, builder.constant(spec.score_scale, np.float32))
        return query, key, value

    def _head_norm(self, x: ir.Value, name: str) -> ir.Value:
        """The operator's own norm of queries and keys is not there on this provider."""
        heads = self._builder.reshape(x, -1, self._spec.head_dim)
        return self._builder.op("Reshape", rms_norm(self._builder, heads, name, self._spec.norm_eps), self.shape)

    def _rotate(self, x: ir.Value, heads: int) -> ir.Value:
        """Three-axis rotary embedding, which GroupQueryAttention does not do itself."""
        rope = self._spec.rope
        return self._builder.op(
            *("MRotaryEmbedding", x, self._positions, *self._rotary),
            domain=MICROSOFT,
            mrope_section=rope.mrope_section,
            mrope_layout=int(rope.mrope_interleaved),
            num_heads=heads,
            rotary_embedding_dim=0 if self._turns_whole else rope.width,
        )

    def output_cache(self) -> None:
        for name, value in self._presents:
            self._builder.output(value, name, np.float32)
