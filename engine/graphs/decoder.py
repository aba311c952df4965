"""The decoder: embedded tokens in, logits out."""

from __future__ import annotations

import onnx_ir as ir

from engine.graphs.dialect import DecoderAttention, DecoderLayers, Residual
from engine.spec import DecoderSpec


def decoder_graph(
    layers: DecoderLayers, attention: DecoderAttention, spec: DecoderSpec, x: ir.Value, rows: ir.Value
) -> ir.Value:
    """Logits [R, vocab] of the tokens at `rows` [R], from the embedded tokens and image features x [T, hidden]."""
    residual = Residual(x)
    for layer in range(spec.layers):
        name = f"layers.{layer}"
        qkv = layers.norm_linear(residual, f"{name}.attention_norm", f"{name}.qkv")
        layers.linear_add(attention.attend(qkv, layer), f"{name}.out", residual)
        mlp = layers.norm_gate(residual, f"{name}.mlp_norm", f"{name}.gate_up")
        layers.linear_add(mlp, f"{name}.down", residual)
        if layer < spec.deepstack:
            layers.add_features(residual, layer + 1)
    return layers.head(residual, "norm", "embedding" if spec.tied_head else "head", rows)
