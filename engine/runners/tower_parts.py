"""A tower's linear layers as the kernels' tuner knows layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.graphs.cuda.fused_tower import TowerLinear
from engine.kernels.linear import LinearParameters
from engine.kernels.linear_bench import Layer
from engine.kernels.tuning import Part
from engine.spec import QwenVisionSpec, SiglipSpec

_SMALL = 224  # pixels; pictures with a shorter side are rare


def tower_parts(layers: Iterable[TowerLinear], spec: SiglipSpec | QwenVisionSpec | None) -> tuple[Part, ...]:
    """Layers that are alike are one part."""
    if spec is None:
        return ()
    counts = Counter((_layer(layer), _fewest(layer, spec)) for layer in layers)
    return tuple(Part(layer, count, fewest=fewest) for (layer, fewest), count in counts.items())


def _layer(layer: TowerLinear) -> Layer:
    parameters = LinearParameters(layer.epsilon, layer.norm, layer.activation, "int8")
    return Layer(layer.n, layer.k, parameters, layer.bias, layer.residual)


def _fewest(layer: TowerLinear, spec: SiglipSpec | QwenVisionSpec) -> int:
    """Patches of a tile or a small picture, or what they are joined to."""
    side = spec.tile if isinstance(spec, SiglipSpec) else _SMALL
    joined = spec.shuffle if isinstance(spec, SiglipSpec) else spec.merge
    patches = (side // spec.patch) ** 2
    return patches if layer.name.startswith(("vision.layers.", "vision.patch")) else patches // joined**2
