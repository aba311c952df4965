"""The words in which a model is described; a dialect says each of them in one target's operators.

Activations are [T, width] throughout, T tokens of all sequences of a call. NAME stands for the artifact's NAME.weight,
NAME.bias and NAME.scale.
"""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir

from engine.graphs.builder import GraphBuilder


class Dialect(Protocol):
    """Each method appends nodes to the builder."""

    @property
    def builder(self) -> GraphBuilder: ...

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """x @ weight.T, plus the bias if the artifact has one."""
        ...


class DecoderDialect(Dialect, Protocol):
    """What a decoder is made of."""

    def rms_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value: ...

    def add_rms_norm(self, x: ir.Value, residual: ir.Value, name: str, epsilon: float) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum)."""
        ...

    def silu_gate(self, x: ir.Value, name: str) -> ir.Value:
        """silu(gate) * up, where NAME's output is gate and up side by side."""
        ...

    def attention(self, qkv: ir.Value, layer: int) -> ir.Value:
        """Rotate queries and keys, append to the KV cache of `layer`, attend causally.

        [T, (heads + 2 * kv_heads) * head_dim] to [T, heads * head_dim].
        """
        ...


class TowerDialect(Dialect, Protocol):
    """What a vision tower is made of."""

    def weight(self, name: str) -> ir.Value:
        """A tensor of the artifact."""
        ...

    def activations(self, x: ir.Value) -> ir.Value:
        """float32 to the type in which the tower computes."""
        ...

    def activated(self, x: ir.Value, name: str, kind: str) -> ir.Value:
        """gelu, gelu_pytorch_tanh or quick_gelu of `linear(x, name)`."""
        ...

    def layer_norm(self, x: ir.Value, name: str, epsilon: float) -> ir.Value: ...

    def add_layer_norm(
        self, x: ir.Value, name: str, residual: ir.Value, norm: str, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum of `residual` and `linear(x, name)`)."""
        ...

    def attention(self, x: ir.Value, name: str) -> ir.Value:
        """Every token to every token of its own sequence, [T, hidden]; NAME's output is queries, keys and values."""
        ...
