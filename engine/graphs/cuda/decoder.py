"""The decoder on CUDA: one packed call for all tokens of a step, PagedAttention over blocks that the runtime owns."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.checkpoints.artifact import Artifact
from engine.graphs.builder import MICROSOFT
from engine.graphs.cuda.linear import cuda_linears
from engine.graphs.cuda.weights import CudaBuilder, CudaGraph
from engine.graphs.decoder import decoder_graph
from engine.graphs.rotary import rotary_tables
from engine.spec import FloatType


class StepInputs:
    """Names in the graph. B sequences with T new tokens in all; int32 and on the device unless said otherwise."""

    IDS = "ids"  # [T]: token ids; -1 - s takes the token that was last chosen for slot s
    SLOT_TOKENS = "slot_tokens"  # [slots]: those tokens
    FEATURE_INDEX = "feature_index"  # [T]: the row of `features` that stands for the token, -1 for text
    FEATURES = "features"  # activations [F, hidden], F > 0
    POSITIONS = "positions"  # [3, T]; only for three-axis rotary embedding
    STARTS = "starts"  # [B + 1]: where each sequence's tokens begin, and T
    PAST = "past"  # [B]: tokens that are in the cache already
    BLOCK_TABLE = "block_table"  # [B, blocks of the longest]
    BOUNDS = "bounds"  # [3] on the host: most new tokens and most tokens of any sequence, and a lower bound of these
    LOGITS_ROWS = "logits_rows"  # [R]: tokens whose logits are wanted
    LOGITS = "logits"  # activations [R, vocab]

    @staticmethod
    def cache(part: str, layer: int) -> str:
        """[blocks, block_size, kv_heads, head_dim], read and written in place; `part` is key or value."""
        return f"cache.{part}.{layer}"

    @staticmethod
    def cache_out(part: str, layer: int) -> str:
        """The same memory."""
        return f"cache_out.{part}.{layer}"


def cuda_decoder(artifact: Artifact, activations: FloatType, positions: int) -> CudaGraph:
    """A model for positions below `positions`."""
    spec = artifact.spec.decoder
    builder = CudaBuilder(artifact, activations)
    dialect = CudaDecoderDialect(builder, artifact, positions)
    rows = builder.input(StepInputs.LOGITS_ROWS, np.int32, ["R"])
    logits = decoder_graph(dialect, spec, dialect.token_inputs(), rows)
    builder.output(logits, StepInputs.LOGITS, builder.dtype.type)
    dialect.output_cache()
    return builder.graph()


class CudaDecoderDialect:
    """Implements `DecoderDialect`."""

    def __init__(self, builder: CudaBuilder, artifact: Artifact, positions: int) -> None:
        self.builder = builder
        self._spec = artifact.spec.decoder
        self._linears = cuda_linears(builder, int8=artifact.precision == "int8")
        self._rotary = rotary_tables(builder, self._spec.rope, positions, builder.dtype.type)
        self._starts = builder.input(StepInputs.STARTS, np.int32, ["B1"])
        self._past = builder.input(StepInputs.PAST, np.int32, ["B"])
        self._blocks = builder.input(StepInputs.BLOCK_TABLE, np.int32, ["B", "M"])
        self._bounds = builder.input(StepInputs.BOUNDS, np.int32, [3])
        self._positions = self._position_input() if self._spec.rope.axes == 3 else None
        self._caches: list[tuple[str, ir.Value]] = []

    def token_inputs(self) -> ir.Value:
        """[T, hidden]: embeddings of tokens, of which the host need not know the newest, and image features."""
        builder = self.builder
        zero, minus_one = builder.constant(0, np.int32), builder.constant(-1, np.int32)
        ids = builder.input(StepInputs.IDS, np.int32, ["T"])
        slot_tokens = builder.input(StepInputs.SLOT_TOKENS, np.int32, ["S"])
        slots = builder.op("Max", builder.op("Sub", minus_one, ids), zero)
        chosen = builder.op("Gather", slot_tokens, slots, axis=0)
        tokens = self._linears.embedding(
            builder.op("Where", builder.op("Less", ids, zero), chosen, ids),
            "embedding",
        )
        index = builder.input(StepInputs.FEATURE_INDEX, np.int32, ["T"])
        features = builder.input(StepInputs.FEATURES, builder.dtype.type, ["F", self._spec.hidden])
        images = builder.op("Gather", features, builder.op("Max", index, zero), axis=0)
        is_text = builder.reshape(builder.op("Less", index, zero), -1, 1)
        return builder.op("Where", is_text, tokens, images)

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        return self._linears.linear(x, name)

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        weight = self.builder.device_weight(f"{name}.weight")
        return self.builder.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon)

    def add_rms_norm(self, x: ir.Value, residual: ir.Value, name: str, epsilon: float) -> tuple[ir.Value, ir.Value]:
        normed, _, _, total = self.builder.ops(
            "SkipSimplifiedLayerNormalization",
            *(residual, x, self.builder.device_weight(f"{name}.weight")),
            outputs=4,
            domain=MICROSOFT,
            epsilon=epsilon,
        )
        return normed, total

    def silu_gate(self, x: ir.Value, name: str) -> ir.Value:
        """Two products instead of one that would have to be split: a copy costs more than a launch."""
        width = self._spec.intermediate
        gate, up = (self._linears.linear(x, name, rows) for rows in ((0, width), (width, 2 * width)))
        # QuickGelu with alpha 1 is x * sigmoid(x).
        return self.builder.op("Mul", self.builder.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0), up)

    def attention(self, qkv: ir.Value, layer: int) -> ir.Value:
        builder, spec = self.builder, self._spec
        caches = [self._cache_input(part, layer) for part in ("key", "value")]
        rotate_inside = self._positions is None
        query, key, value = (qkv, None, None) if rotate_inside else self._rotate(qkv)
        output, *written = builder.ops(
            "PagedAttention",
            *(query, key, value, *caches, self._starts, self._past, self._blocks),
            *(self._rotary if rotate_inside else (None, None)),
            *(None,) * 6,  # slot mapping, head sink, q and k norm, k and v scale
            self._bounds,
            outputs=3,
            domain=MICROSOFT,
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            do_rotary=int(rotate_inside),
        )
        self._caches += zip((StepInputs.cache_out(part, layer) for part in ("key", "value")), written, strict=True)
        return output

    def output_cache(self) -> None:
        """Declare the caches as outputs, after the logits."""
        for name, value in self._caches:
            self.builder.output(value, name, self.builder.dtype.type)

    def _cache_input(self, part: str, layer: int) -> ir.Value:
        shape = ("blocks", "block_size", self._spec.kv_heads, self._spec.head_dim)
        return self.builder.input(StepInputs.cache(part, layer), self.builder.dtype.type, shape)

    def _position_input(self) -> ir.Value:
        """[3, 1, T] of the type that MRotaryEmbedding takes."""
        builder = self.builder
        positions = builder.input(StepInputs.POSITIONS, np.int32, [3, "T"])
        return builder.op("Cast", builder.reshape(positions, 3, 1, -1), to=int(ir.DataType.INT64))

    def _rotate(self, packed: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Three-axis rotary embedding, which PagedAttention does not do itself."""
        builder, spec = self.builder, self._spec
        widths = [spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim]
        query, key, value = builder.ops("Split", packed, builder.constant(widths, np.int64), outputs=3, axis=-1)
        query, key = (
            builder.reshape(self._rotate_heads(x, heads), -1, width)
            for x, heads, width in ((query, spec.heads, widths[0]), (key, spec.kv_heads, widths[1]))
        )
        return query, key, value

    def _rotate_heads(self, x: ir.Value, heads: int) -> ir.Value:
        builder = self.builder
        return builder.op(
            "MRotaryEmbedding",
            *(builder.op("Unsqueeze", x, builder.constant([0], np.int64)), self._positions, *self._rotary),
            domain=MICROSOFT,
            mrope_section=self._spec.rope.mrope_section,
            num_heads=heads,
        )
