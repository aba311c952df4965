"""The words in which a model is described; a dialect says each of them in one target's operators.

Activations are [T, width] throughout, T tokens of all sequences of a call. NAME stands for the artifact's NAME.weight,
NAME.bias and NAME.scale: `linear` is x @ weight.T, plus the bias if the artifact has one. Each method appends nodes to
the builder's graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from engine.graphs.builder import GraphBuilder


@dataclass(slots=True)
class Residual:
    """What a decoder's blocks read and add to. `added` waits for a norm that adds it in passing."""

    value: ir.Value
    added: ir.Value | None = None


class DecoderLayers(Protocol):
    """All of a decoder but attention. NORM is the weight of an RMS norm, most often of what reads the residual."""

    def norm_linear(self, x: Residual, norm: str, name: str) -> ir.Value: ...

    def norm_gate(self, x: Residual, norm: str, name: str) -> ir.Value:
        """activation(gate) * up, where NAME's output is gate and up side by side."""
        ...

    def linear_add(self, x: ir.Value, name: str, residual: Residual, norm: str | None = None) -> None:
        """Add NAME's output, normed before that if a NORM is given."""
        ...

    def add_features(self, residual: Residual, part: int) -> None:
        """Add values [part * hidden, (part + 1) * hidden) of image features to the tokens that they stand for."""
        ...

    def head(self, x: Residual, norm: str, name: str, rows: ir.Value | None) -> ir.Value:
        """NAME's output of the tokens at `rows` [R], or of all."""
        ...


class DecoderAttention(Protocol):
    def attend(self, qkv: ir.Value, layer: int) -> ir.Value:
        """Rotate queries and keys, append to the KV cache of `layer`, attend causally.

        [T, (heads + 2 * kv_heads) * head_dim] to [T, heads * head_dim].
        """
        ...

    def output_cache(self) -> None:
        """Declare the caches as outputs, after the logits."""
        ...


class LinearAttention(Protocol):
    def mix(self, qkvz: ir.Value, gates: ir.Value, layer: int) -> ir.Value:
        """Gated DeltaNet: take the tokens into the state of `layer`, and give what each reads from it.

        Queries, keys, values and output gate side by side, [T, conv_width + value_width], and what makes decay and
        update rate, [T, 2 * value_heads], to [T, value_width].
        """
        ...

    def output_state(self) -> None:
        """Declare the states as outputs, after the logits."""
        ...


class TowerDialect(Protocol):
    """What a vision tower is made of."""

    @property
    def builder(self) -> GraphBuilder: ...

    def linear(self, x: ir.Value, name: str) -> ir.Value: ...

    def weight(self, name: str) -> ir.Value:
        """A tensor of the artifact."""
        ...

    def activations(self, x: ir.Value) -> ir.Value:
        """float32 to the type in which the tower computes."""
        ...

    def activated(self, x: ir.Value, name: str, kind: str) -> ir.Value:
        """gelu, gelu_pytorch_tanh or quick_gelu of `linear(x, name)`; silu_gate is `norm_gate`'s of a decoder."""
        ...

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value:
        """An RMS norm if the artifact has no bias for it."""
        ...

    def add_layer_norm(
        self, x: ir.Value, name: str, residual: ir.Value, norm: str, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum of `residual` and `linear(x, name)`)."""
        ...

    def attention(self, x: ir.Value, name: str, *, windowed: bool = False) -> ir.Value:
        """Every token to every token of its own sequence, or window of it; NAME's output is queries, keys and values.

        [T, hidden] to [T, hidden].
        """
        ...
