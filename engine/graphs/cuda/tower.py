"""Vision towers on CUDA: the images of many requests packed into one call, nothing padded."""

from __future__ import annotations

import numpy as np

from engine.checkpoints.artifact import Artifact
from engine.graphs.cuda.fused import STOCK, Fusion
from engine.graphs.cuda.fused_tower import FusedTowerDialect, RoundedTowerDialect, TowerLinear
from engine.graphs.cuda.rounded import ROUNDED
from engine.graphs.cuda.tower_dialect import CudaTowerDialect, TowerInputs
from engine.graphs.cuda.weights import CudaBuilder, CudaGraph
from engine.graphs.qwen_vision import TAPS, LearnedPositions, qwen_vision_graph
from engine.graphs.siglip import siglip_graph
from engine.spec import FloatType, QwenVisionSpec, SiglipSpec

__all__ = ["TowerInputs", "cuda_tower", "rounded_tower", "tower_linears"]


def cuda_tower(artifact: Artifact, activations: FloatType, fusion: Fusion = STOCK) -> CudaGraph:
    """A model of the tower and its connector.

    With `fusion.tower` and int8 weights the linear layers that our kernels can read are ours; all others have weights
    of type `activations`, whatever the artifact's precision: ONNX Runtime's int8 products are slower with so many rows.
    """
    builder, spec = CudaBuilder(artifact, activations), _spec(artifact)
    if fusion.tower and artifact.precision == "int8":
        return _graph(builder, FusedTowerDialect(builder, spec, fusion.float_inputs), spec)
    return _graph(builder, CudaTowerDialect(builder, spec), spec)


def tower_linears(artifact: Artifact) -> tuple[TowerLinear, ...]:
    """The linear layers of a tower of int8 weights that are ours, in the order in which they run."""
    builder, spec = CudaBuilder(artifact, "float16"), _spec(artifact)
    dialect = FusedTowerDialect(builder, spec)
    _graph(builder, dialect, spec)
    return tuple(dialect.layers)


def rounded_tower(artifact: Artifact, activations: FloatType) -> CudaGraph:
    """As `cuda_tower` makes with `fusion.tower`, over the same weights: all rows are 16-bit and go through int8 where
    the input ROUNDED, int32 [tower_linears], is not 0.
    """
    builder, spec = CudaBuilder(artifact, activations), _spec(artifact)
    names = [layer.name for layer in tower_linears(artifact)]
    rounded = builder.input(ROUNDED, np.int32, [len(names)])
    return _graph(builder, RoundedTowerDialect(builder, spec, rounded, names), spec)


def _spec(artifact: Artifact) -> SiglipSpec | QwenVisionSpec:
    assert artifact.spec.vision is not None, "This is a bug: a text-only model has no tower."
    return artifact.spec.vision


def _graph(builder: CudaBuilder, dialect: CudaTowerDialect, spec: SiglipSpec | QwenVisionSpec) -> CudaGraph:
    if isinstance(spec, SiglipSpec):
        pixels = builder.input(TowerInputs.PIXELS, np.uint8, ["tiles", 3, spec.tile, spec.tile])
        features = siglip_graph(dialect, spec, pixels)
    else:
        pixels = builder.input(TowerInputs.PIXELS, np.uint8, ["T", 3, "F", spec.patch**2])
        positions = _positions(builder) if spec.position_side else None
        features = qwen_vision_graph(dialect, spec, pixels, positions)
    builder.output(features, TowerInputs.FEATURES, builder.dtype.type)
    return builder.graph()


def _positions(builder: CudaBuilder) -> LearnedPositions:
    rows = builder.input(TowerInputs.TAPS, np.int32, [TAPS, "T"])
    return LearnedPositions(rows, builder.input(TowerInputs.TAP_WEIGHTS, np.float32, [TAPS, "T", 1]))
