"""Vision towers over int8 weights: norm, product, bias, activation and sum are one node of ours."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from engine.graphs.cuda.fused import Activation, Norm, linear_node
from engine.graphs.cuda.rounded import rounded_where
from engine.graphs.cuda.tower_dialect import CudaTowerDialect
from engine.graphs.cuda.weights import CudaBuilder
from engine.spec import QwenVisionSpec, SiglipSpec

LOAD = 16  # int8 weights that the kernels load at once
_ACTIVATIONS: dict[str, Activation] = {
    "silu_gate": "silu_gate",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
_NORMS: dict[str, Norm] = {"LayerNormalization": "layer", "SimplifiedLayerNormalization": "rms"}
_NO_AFFINE: tuple[ir.Value | None, ir.Value | None] = (None, None)


def fits(builder: CudaBuilder, name: str) -> bool:
    """Whether the kernels multiply by a layer's weight at full speed: int8, each row of it at a multiple of LOAD.

    Others are widened to 16 bits and multiplied by the stock operator. Of released checkpoints these are the patches'
    products of towers with patches of 14 pixels, and what follows the MLP's gate in Qwen2.5-VL (3,420 inputs).
    """
    return builder.has(f"{name}.scale") and builder.shape(f"{name}.weight")[1] % LOAD == 0


@dataclass(frozen=True, slots=True)
class TowerLinear:
    """A node of ours in a tower. Weight [n, k]."""

    name: str
    n: int
    k: int
    norm: Norm
    epsilon: float
    activation: Activation
    bias: bool
    residual: bool


class FusedTowerDialect(CudaTowerDialect):
    """Implements `TowerDialect`. A norm is a node of its own too, which nobody reads where all its readers are ours."""

    def __init__(
        self, builder: CudaBuilder, spec: SiglipSpec | QwenVisionSpec, float_inputs: Collection[str] = ()
    ) -> None:
        super().__init__(builder, spec)
        self._float_inputs = float_inputs
        self.layers: list[TowerLinear] = []

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        return self._fused(x, name) if fits(self.builder, name) else super().linear(x, name)

    def activated(self, x: ir.Value, name: str, kind: str) -> ir.Value:
        if not fits(self.builder, name):
            return super().activated(x, name, kind)
        return self._fused(x, name, activation=_ACTIVATIONS[kind])

    def add_layer_norm(
        self, x: ir.Value, name: str, residual: ir.Value, norm: str, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        if not fits(self.builder, name):
            return super().add_layer_norm(x, name, residual, norm, epsilon)
        total = self._fused(x, name, residual=residual)
        return self.layer_norm(total, norm, epsilon), total

    def _fused(
        self, x: ir.Value, name: str, *, activation: Activation = "none", residual: ir.Value | None = None
    ) -> ir.Value:
        """With the norm that `x` comes from, if it does."""
        builder, node = self.builder, x.producer()
        norm, epsilon, affine = _NORMS.get(node.op_type if node else "", "none"), 0.0, _NO_AFFINE
        if node is not None and norm != "none":
            source, weight, *shift = node.inputs
            assert source is not None, "This is a bug: a norm of nothing."
            x, affine, epsilon = source, (weight, shift[0] if shift else None), node.attributes["epsilon"].as_float()
        n, k = builder.shape(f"{name}.weight")
        bias = builder.has(f"{name}.bias")
        self.layers.append(TowerLinear(name, n, k, norm, epsilon, activation, bias, residual is not None))
        return linear_node(
            builder,
            *(x, name),
            norm=norm,
            epsilon=epsilon,
            affine=affine,
            activation=activation,
            path="float" if name in self._float_inputs else "int8",
            residual=residual,
        )


class RoundedTowerDialect(FusedTowerDialect):
    """Rows of 16 bits that went through int8 and back on the way, or did not. All norms are nodes of their own."""

    def __init__(
        self, builder: CudaBuilder, spec: SiglipSpec | QwenVisionSpec, rounded: ir.Value, names: Sequence[str]
    ) -> None:
        """`rounded` int32 [names]: not 0 rounds the layer's rows."""
        super().__init__(builder, spec, float_inputs=names)
        self._rounded = rounded
        self._places = {name: place for place, name in enumerate(names)}

    def _fused(
        self, x: ir.Value, name: str, *, activation: Activation = "none", residual: ir.Value | None = None
    ) -> ir.Value:
        x = rounded_where(self.builder, self._rounded, self._places[name], x)
        return super()._fused(x, name, activation=activation, residual=residual)
