"""The decoder on CUDA: one packed call for all tokens of a step, PagedAttention over blocks that the runtime owns."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engine.checkpoints.artifact import Artifact
from engine.graphs.builder import MICROSOFT
from engine.graphs.cuda.attention import PagedAttention
from engine.graphs.cuda.delta_net import CudaDeltaNet
from engine.graphs.cuda.features import Features
from engine.graphs.cuda.fused import STOCK, FusedDecodeAttention, FusedLayers, Fusion
from engine.graphs.cuda.inputs import StepInputs
from engine.graphs.cuda.linear import cuda_linears
from engine.graphs.cuda.unfused import UnfusedAttention
from engine.graphs.cuda.weights import CudaBuilder, CudaGraph
from engine.graphs.decoder import decoder_graph, scaled_embedding, softcapped
from engine.graphs.dialect import DecoderAttention, LinearAttention, Residual
from engine.spec import DecoderSpec, FloatType


def cuda_decoder(
    artifact: Artifact,
    activations: FloatType,
    positions: int,
    *,
    paged: bool = True,
    int8_cache: bool = False,
    fusion: Fusion = STOCK,
    decode: bool = False,
    mutual: bool = False,
) -> CudaGraph:
    """A model for positions below `positions`; with `decode` for steps of one token for each sequence, the one that was
    last chosen for its slot. Those have no images among their tokens, and all their logits are wanted.

    With `mutual` the new tokens of a sequence see each other in both directions, as those of an image do in models that
    are made so: it is for steps in which whoever has more than one has an image's, from its first to its last.

    Its attention is PagedAttention, which a device has in 16 bits, or unless `paged` plain operators, or in a graph for
    decoding what `fusion` says. PagedAttention with int8 keys and values takes the operator's fast kernels for decoding
    where 4, 8, 16 or 32 queries share a key; others widen what they read, and steps that prefill widen all keys and
    values of their sequences first.
    """
    spec = artifact.spec.decoder
    builder = CudaBuilder(artifact, activations)
    layers: StockLayers | FusedLayers
    if fusion.linear and artifact.precision == "int8":
        layers = FusedLayers(builder, artifact, fusion.float_inputs)
    else:
        layers = StockLayers(builder, artifact, decode=decode)
    attention: DecoderAttention
    if not paged:
        assert not int8_cache, "This is a bug: attention in plain operators keeps no int8."
        attention = UnfusedAttention(builder, spec, positions, mutual=mutual)
    elif decode and fusion.attention:
        attention = FusedDecodeAttention(builder, spec, positions, int8_cache=int8_cache)
    else:
        attention = PagedAttention(builder, spec, positions, int8_cache=int8_cache, mutual=mutual)
    linear_attention = None
    if spec.delta_net is not None:
        paged_starts = attention.starts if isinstance(attention, PagedAttention) else None
        starts = paged_starts or builder.input(StepInputs.STARTS, np.int32, ["B1"])
        linear_attention = CudaDeltaNet(builder, spec.delta_net, spec.norm_eps, starts)
    return assembled(builder, spec, layers, attention, linear_attention, decode=decode)


def assembled(
    builder: CudaBuilder,
    spec: DecoderSpec,
    layers: StockLayers | FusedLayers,
    attention: DecoderAttention,
    linear_attention: LinearAttention | None = None,
    *,
    decode: bool = False,
) -> CudaGraph:
    """The graph from tokens to logits, caches and states."""
    rows = None if decode else builder.input(StepInputs.LOGITS_ROWS, np.int32, ["R"])
    logits = decoder_graph(layers, attention, spec, layers.tokens(), rows, linear_attention)
    builder.output(logits, StepInputs.LOGITS, builder.dtype.type)
    attention.output_cache()
    if linear_attention is not None:
        linear_attention.output_state()
    return builder.graph()


class StockLayers:
    """Implements `DecoderLayers` in the wheel's operators."""

    def __init__(self, builder: CudaBuilder, artifact: Artifact, *, decode: bool = False) -> None:
        """`decode`: every token is the one that was last chosen for its sequence's slot."""
        self._builder = builder
        self._decode = decode
        self._model = artifact.spec
        self._spec = artifact.spec.decoder
        self._linears = cuda_linears(builder, int8=artifact.precision == "int8")
        self._normed: tuple[ir.Value, str, ir.Value] | None = None  # what `_norm` gave last

    def tokens(self) -> ir.Value:
        """[T, hidden]: embeddings of tokens, of which the host need not know the newest, and image features."""
        builder = self._builder
        slot_tokens = builder.input(StepInputs.SLOT_TOKENS, np.int32, ["S"])
        if self._decode:
            slots = builder.input(StepInputs.SLOTS, np.int32, ["T"])
            return self._embedded(builder.op("Gather", slot_tokens, slots, axis=0))
        zero, minus_one = builder.constant(0, np.int32), builder.constant(-1, np.int32)
        ids = builder.input(StepInputs.IDS, np.int32, ["T"])
        slots = builder.op("Max", builder.op("Sub", minus_one, ids), zero)
        chosen = builder.op("Gather", slot_tokens, slots, axis=0)
        tokens = self._embedded(builder.op("Where", builder.op("Less", ids, zero), chosen, ids))
        self._features = Features(builder, self._spec)
        return self._features.placed(0, tokens)

    def _embedded(self, token_ids: ir.Value) -> ir.Value:
        x = self._linears.embedding(token_ids, "embedding")
        return scaled_embedding(self._builder, x, self._model, self._builder.dtype.type)

    def norm_linear(self, x: Residual, norm: str, name: str) -> ir.Value:
        return self._linears.linear(self._norm(x, norm), name)

    def norm_gate(self, x: Residual, norm: str, name: str) -> ir.Value:
        """Two products instead of one that would have to be split: a copy costs more than a launch."""
        normed, width = self._norm(x, norm), self._spec.intermediate
        gate, up = (self._linears.linear(normed, name, rows) for rows in ((0, width), (width, 2 * width)))
        return self._builder.op("Mul", self._activated(gate), up)

    def _activated(self, gate: ir.Value) -> ir.Value:
        if self._spec.activation == "gelu_pytorch_tanh":
            return self._builder.op("FastGelu", gate, domain=MICROSOFT)
        # With alpha 1 it is x * sigmoid(x).
        return self._builder.op("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)

    def linear_add(self, x: ir.Value, name: str, residual: Residual, norm: str | None = None) -> None:
        added = self._linears.linear(x, name)
        residual.added = added if norm is None else self._norm(Residual(added), norm)

    def add_features(self, residual: Residual, part: int) -> None:
        if not self._decode:
            self._features.add(residual, part)

    def head(self, x: Residual, norm: str, name: str, rows: ir.Value | None) -> ir.Value:
        normed = self._norm(x, norm)
        chosen = normed if rows is None else self._builder.op("Gather", normed, rows, axis=0)
        logits = self._linears.linear(chosen, name)
        return softcapped(self._builder, logits, self._spec, self._builder.dtype.type)

    def _norm(self, x: Residual, name: str) -> ir.Value:
        """The norm of the residual and what waits to be added to it; one launch for both.

        Asked for again, as linear attention's two products do, it is the same value.
        """
        builder, epsilon = self._builder, self._spec.norm_eps
        if x.added is None and self._normed is not None and self._normed[:2] == (x.value, name):
            return self._normed[2]
        weight = builder.device_weight(f"{name}.weight")
        if x.added is None:
            normed = builder.op("SimplifiedLayerNormalization", x.value, weight, axis=-1, epsilon=epsilon)
        else:
            normed, _, _, x.value = builder.ops(
                *("SkipSimplifiedLayerNormalization", x.value, x.added, weight),
                outputs=4,
                domain=MICROSOFT,
                epsilon=epsilon,
            )
            x.added = None
        self._normed = (x.value, name, normed)
        return normed
