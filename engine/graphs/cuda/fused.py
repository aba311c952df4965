"""The decoder in operators of our own (engine/kernels/operators.py): five to a layer.

int8 weights are read as they lie in the artifact, so that the product of a few rows and of many share one copy, and a
tied embedding and head too.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from engine.checkpoints.artifact import Artifact
from engine.graphs.builder import TESSERA
from engine.graphs.cuda.attention import Caches
from engine.graphs.cuda.features import Features
from engine.graphs.cuda.heads import Heads
from engine.graphs.cuda.inputs import PARTS, StepInputs
from engine.graphs.cuda.weights import CudaBuilder
from engine.graphs.dialect import Residual
from engine.spec import DecoderSpec

Norm = Literal["none", "rms", "layer"]
Activation = Literal["none", "silu_gate", "gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True, slots=True)
class Fusion:
    """Which operators are ours: a decoder's linear layers and attention, a vision tower's linear layers.

    `float_inputs` are the linear layers, of both, whose activations are not quantised.
    """

    linear: bool
    attention: bool
    float_inputs: frozenset[str] = frozenset()
    tower: bool = False


STOCK = Fusion(linear=False, attention=False)
"""All operators are ONNX Runtime's own."""


def fusable(spec: DecoderSpec) -> bool:
    """Whether our operators compute such a decoder: gated SiLU, no norm of what is added, full attention."""
    return (
        spec.activation == "silu"
        and spec.sliding is None
        and spec.delta_net is None
        and not (spec.output_norms or spec.scaled_embedding or spec.query_scalar or spec.logit_softcap)
    )


class FusedLayers:
    """Implements `DecoderLayers` for int8 weights: norm, product, bias, gate and residual are one node."""

    def __init__(self, builder: CudaBuilder, artifact: Artifact, float_inputs: Collection[str]) -> None:
        self._builder = builder
        self._spec = artifact.spec.decoder
        self._float_inputs = float_inputs

    def tokens(self) -> ir.Value:
        """[T, hidden]: embeddings of tokens, of which the host need not know the newest, and image features."""
        builder = self._builder
        ids = builder.input(StepInputs.IDS, np.int32, ["T"])
        slot_tokens = builder.input(StepInputs.SLOT_TOKENS, np.int32, ["S"])
        self._features = features = Features(builder, self._spec)
        inputs = (ids, slot_tokens, *_stored(builder, "embedding"), features.index, features.part(0))
        return _node(builder, "TokenEmbedding", *inputs, parameters={})

    def norm_linear(self, x: Residual, norm: str, name: str) -> ir.Value:
        return self._linear(x.value, name, norm=norm)

    def norm_gate(self, x: Residual, norm: str, name: str) -> ir.Value:
        return self._linear(x.value, name, norm=norm, activation="silu_gate")

    def linear_add(self, x: ir.Value, name: str, residual: Residual, norm: str | None = None) -> None:
        assert norm is None, "This is a bug: a model that norms what it adds has no fused layers."
        residual.value = self._linear(x, name, residual=residual.value)

    def add_features(self, residual: Residual, part: int) -> None:
        self._features.add(residual, part)

    def head(self, x: Residual, norm: str, name: str, rows: ir.Value | None) -> ir.Value:
        chosen = x.value if rows is None else self._builder.op("Gather", x.value, rows, axis=0)
        return self._linear(chosen, name, norm=norm)

    def _linear(
        self,
        x: ir.Value,
        name: str,
        *,
        norm: str | None = None,
        activation: Activation = "none",
        residual: ir.Value | None = None,
    ) -> ir.Value:
        return linear_node(
            self._builder,
            *(x, name),
            norm="rms" if norm else "none",
            epsilon=self._spec.norm_eps if norm else 0.0,
            affine=(self._builder.device_weight(f"{norm}.weight") if norm else None, None),
            activation=activation,
            path="float" if name in self._float_inputs else "auto",
            residual=residual,
        )


class FusedDecodeAttention:
    """Implements `DecoderAttention` for steps of one token for each sequence."""

    def __init__(self, builder: CudaBuilder, spec: DecoderSpec, positions: int, *, int8_cache: bool) -> None:
        self._builder = builder
        self._spec = spec
        self._heads = Heads(builder, spec, positions)
        self._past = builder.input(StepInputs.PAST, np.int32, ["B"])
        self._blocks = builder.input(StepInputs.BLOCK_TABLE, np.int32, ["B", "M"])
        axes = spec.rope.axes
        self._positions = builder.input(StepInputs.POSITIONS, np.int32, [3, "T"]) if axes == 3 else None
        self._caches = Caches(builder, spec, int8=int8_cache)

    def attend(self, qkv: ir.Value, layer: int) -> ir.Value:
        spec, rope = self._spec, self._spec.rope
        parameters = {
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "qk_norm_epsilon": spec.norm_eps if spec.qk_norm else None,
            "mrope_section": list(rope.mrope_section) if rope.axes == 3 else [],
            "mrope_interleaved": rope.mrope_interleaved,
        }
        return _node(
            self._builder,
            "PagedDecode",
            *(qkv, *(self._caches.input(part, layer) for part in PARTS)),
            *(self._past, self._blocks, *self._heads.tables(layer), self._positions),
            *self._heads.norm_weights(layer),
            *(self._caches.scale(part, layer) for part in PARTS),
            parameters=parameters,
        )

    def output_cache(self) -> None:
        """Nothing: the operator writes into its inputs' memory, which nobody else in the graph reads."""


def linear_node(
    builder: CudaBuilder,
    x: ir.Value,
    name: str,
    *,
    norm: Norm,
    epsilon: float,
    affine: tuple[ir.Value | None, ir.Value | None],
    activation: Activation,
    path: Literal["auto", "int8", "float"],
    residual: ir.Value | None,
) -> ir.Value:
    """One layer with the norm before it, of which `affine` are weight and bias, and the activation or sum behind it."""
    bias = builder.device_weight(f"{name}.bias") if builder.has(f"{name}.bias") else None
    parameters = {"norm": norm, "epsilon": epsilon, "activation": activation, "path": path}
    return _node(builder, "Linear", x, *_stored(builder, name), bias, *affine, residual, parameters=parameters)


def _stored(builder: CudaBuilder, name: str) -> tuple[ir.Value, ir.Value]:
    """A layer's weight int8 [out, in] and scale float32 [out]."""
    weight, scale = (builder.device_weight(f"{name}.{part}", form="stored") for part in ("weight", "scale"))
    return weight, scale


def _node(builder: CudaBuilder, kind: str, *inputs: ir.Value | None, parameters: dict[str, Any]) -> ir.Value:
    """A node of an operator of ours; `parameters` is what the operator's `open` gets."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    return builder.op(kind, *inputs, domain=TESSERA, parameters=json.dumps(parameters))
