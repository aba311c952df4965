"""SigLIP's tower, which several families put in front of their decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.families.family import Source, Weight, layer_norm, linear, plain
from engine.families.section import Section
from engine.families.vision import ACTIVATIONS, read_norm
from engine.spec import PixelNorm, SiglipSpec


@dataclass(frozen=True, slots=True)
class SiglipDefaults:
    """What a family means by a field that vision_config leaves out."""

    hidden: int
    heads: int
    patch: int


def read_siglip(
    vision: Section,
    preprocessor: Mapping[str, Any],
    defaults: SiglipDefaults,
    *,
    shuffle: int,
    connector: Literal["shuffle", "mean"] = "shuffle",
) -> SiglipSpec:
    """Raises CheckpointError for values that the graphs do not cover."""
    spec = SiglipSpec(
        layers=vision.integer("num_hidden_layers", 12),
        hidden=vision.integer("hidden_size", defaults.hidden),
        heads=vision.integer("num_attention_heads", defaults.heads),
        intermediate=vision.integer("intermediate_size", 3072),
        norm_eps=vision.number("layer_norm_eps", 1e-6),
        activation=vision.choice("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS),
        tile=vision.integer("image_size", 224),
        patch=vision.integer("patch_size", defaults.patch),
        shuffle=shuffle,
        norm=read_norm(preprocessor, PixelNorm()),
        connector=connector,
    )
    vision.divided("hidden_size", spec.hidden, spec.heads)
    if vision.integer("num_channels", 3) != 3:
        raise vision.fail("num_channels", "3")
    return spec


def siglip_weights(spec: SiglipSpec) -> list[Weight]:
    """All but the connector's. Sources are spelled `vision.*`."""
    patch = Source("vision.embeddings.patch_embedding.weight", (spec.hidden, 3, spec.patch, spec.patch))
    positions = (spec.tile // spec.patch) ** 2
    weights = [
        Weight("vision.patch.weight", "linear", (patch,)),
        plain("vision.patch.bias", "vision.embeddings.patch_embedding.bias", spec.hidden),
        plain("vision.position.weight", "vision.embeddings.position_embedding.weight", positions, spec.hidden),
    ]
    for layer in range(spec.layers):
        weights += _layer_weights(spec, f"vision.layers.{layer}", f"vision.encoder.layers.{layer}")
    weights += layer_norm("vision.norm", "vision.post_layernorm", spec.hidden)
    return weights


def _layer_weights(spec: SiglipSpec, name: str, source: str) -> list[Weight]:
    qkv = tuple((f"{source}.self_attn.{part}_proj", spec.hidden) for part in "qkv")
    return [
        *layer_norm(f"{name}.attention_norm", f"{source}.layer_norm1", spec.hidden),
        *linear(f"{name}.qkv", qkv, spec.hidden),
        *linear(f"{name}.out", ((f"{source}.self_attn.out_proj", spec.hidden),), spec.hidden),
        *layer_norm(f"{name}.mlp_norm", f"{source}.layer_norm2", spec.hidden),
        *linear(f"{name}.up", ((f"{source}.mlp.fc1", spec.intermediate),), spec.hidden),
        *linear(f"{name}.down", ((f"{source}.mlp.fc2", spec.hidden),), spec.intermediate),
    ]
