"""The decoder: embedded tokens in, logits out."""

from __future__ import annotations

import math

import ml_dtypes  # noqa: F401 - importing it gives numpy the bfloat16 that a spec names
import numpy as np
import onnx_ir as ir

from engine.graphs.builder import GraphBuilder
from engine.graphs.dialect import DecoderAttention, DecoderLayers, LinearAttention, Residual
from engine.spec import DecoderSpec, ModelSpec


def decoder_graph(
    layers: DecoderLayers,
    attention: DecoderAttention,
    spec: DecoderSpec,
    x: ir.Value,
    rows: ir.Value | None,
    linear_attention: LinearAttention | None = None,
) -> ir.Value:
    """Logits [R, vocab] of the tokens at `rows` [R], or of all, from embedded tokens and image features x [T, hidden].

    `linear_attention` is there if the decoder has such layers.
    """

    def output_norm(part: str) -> str | None:
        return f"{part}_output_norm" if spec.output_norms else None

    residual = Residual(x)
    for layer in range(spec.layers):
        name = f"layers.{layer}"
        norm = f"{name}.attention_norm"
        if spec.delta_net is not None and layer in spec.delta_net.layers:
            assert linear_attention is not None, "This is a bug: a dialect without linear attention."
            gates = layers.norm_linear(residual, norm, f"{name}.gates")
            mixed = linear_attention.mix(layers.norm_linear(residual, norm, f"{name}.qkvz"), gates, layer)
        else:
            mixed = attention.attend(layers.norm_linear(residual, norm, f"{name}.qkv"), layer)
        layers.linear_add(mixed, f"{name}.out", residual, output_norm(f"{name}.attention"))
        mlp = layers.norm_gate(residual, f"{name}.mlp_norm", f"{name}.gate_up")
        layers.linear_add(mlp, f"{name}.down", residual, output_norm(f"{name}.mlp"))
        if layer < spec.deepstack:
            layers.add_features(residual, layer + 1)
    return layers.head(residual, "norm", "embedding" if spec.tied_head else "head", rows)


def scaled_embedding(builder: GraphBuilder, x: ir.Value, spec: ModelSpec, dtype: type[np.generic]) -> ir.Value:
    """Embeddings [T, hidden] of `dtype`, times the root of `hidden` if the model is made so.

    The factor is rounded to the checkpoint's type, as in training and in the reference (Gemma3TextScaledWordEmbedding).
    """
    if not spec.decoder.scaled_embedding:
        return x
    factor = np.dtype(spec.dtype).type(math.sqrt(spec.decoder.hidden))
    return builder.op("Mul", x, builder.constant(float(factor), dtype))


def softcapped(builder: GraphBuilder, logits: ir.Value, spec: DecoderSpec, dtype: type[np.generic]) -> ir.Value:
    """softcap * tanh(logits / softcap), if the model has one (Gemma 2, arXiv:2408.00118, 2)."""
    if not spec.logit_softcap:
        return logits
    cap = builder.constant(spec.logit_softcap, dtype)
    return builder.op("Mul", builder.op("Tanh", builder.op("Div", logits, cap)), cap)
