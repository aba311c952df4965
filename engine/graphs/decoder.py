"""The decoder: embedded tokens in, logits out."""

from __future__ import annotations

import onnx_ir as ir

from engine.graphs.dialect import DecoderDialect
from engine.spec import DecoderSpec


def decoder_graph(dialect: DecoderDialect, spec: DecoderSpec, x: ir.Value, rows: ir.Value) -> ir.Value:
    """Logits [R, vocab] of the tokens at `rows` [R], from the embedded tokens and image features x [T, hidden]."""
    normed = dialect.rms_norm(x, "layers.0.attention_norm", spec.norm_eps)
    for layer in range(spec.layers):
        name = f"layers.{layer}"
        qkv = dialect.linear(normed, f"{name}.qkv")
        attention = dialect.linear(dialect.attention(qkv, layer), f"{name}.out")
        normed, x = dialect.add_rms_norm(attention, x, f"{name}.mlp_norm", spec.norm_eps)
        mlp = dialect.linear(dialect.silu_gate(normed, f"{name}.gate_up"), f"{name}.down")
        following = f"layers.{layer + 1}.attention_norm" if layer + 1 < spec.layers else "norm"
        normed, x = dialect.add_rms_norm(mlp, x, following, spec.norm_eps)
    chosen = dialect.builder.op("Gather", normed, rows, axis=0)
    return dialect.linear(chosen, "embedding" if spec.tied_head else "head")
