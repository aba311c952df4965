"""The decoder on CUDA: one packed call for all tokens of a step, PagedAttention over blocks that the runtime owns."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.checkpoints.artifact import Artifact
from engine.graphs.builder import MICROSOFT
from engine.graphs.cuda.attention import PagedAttention
from engine.graphs.cuda.inputs import StepInputs
from engine.graphs.cuda.linear import cuda_linears
from engine.graphs.cuda.unfused import UnfusedAttention
from engine.graphs.cuda.weights import CudaBuilder, CudaGraph
from engine.graphs.decoder import decoder_graph
from engine.spec import FloatType


def cuda_decoder(
    artifact: Artifact, activations: FloatType, positions: int, *, fused: bool = True, int8_cache: bool = False
) -> CudaGraph:
    """A model for positions below `positions`.

    Its attention is PagedAttention, which a device has in 16 bits, or unless `fused` plain operators. With int8 keys
    and values, decoding takes the operator's fast kernels where 4, 8, 16 or 32 queries share a key; others widen what
    they read, and steps that prefill widen all keys and values of their sequences first.
    """
    spec = artifact.spec.decoder
    builder = CudaBuilder(artifact, activations)
    dialect = CudaDecoderDialect(builder, artifact, positions, fused=fused, int8_cache=int8_cache)
    rows = builder.input(StepInputs.LOGITS_ROWS, np.int32, ["R"])
    logits = decoder_graph(dialect, spec, dialect.token_inputs(), rows)
    builder.output(logits, StepInputs.LOGITS, builder.dtype.type)
    dialect.output_cache()
    return builder.graph()


class CudaDecoderDialect:
    """Implements `DecoderDialect`."""

    def __init__(
        self, builder: CudaBuilder, artifact: Artifact, positions: int, *, fused: bool, int8_cache: bool
    ) -> None:
        self.builder = builder
        self._spec = artifact.spec.decoder
        self._linears = cuda_linears(builder, int8=artifact.precision == "int8")
        if fused:
            self._attention: PagedAttention | UnfusedAttention = PagedAttention(
                builder, self._spec, positions, int8_cache=int8_cache
            )
        else:
            assert not int8_cache, "This is a bug: attention in plain operators keeps no int8."
            self._attention = UnfusedAttention(builder, self._spec, positions)

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
        return self._attention.attend(qkv, layer)

    def output_cache(self) -> None:
        """Declare the caches as outputs, after the logits."""
        self._attention.output_cache()
