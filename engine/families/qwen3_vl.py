"""Qwen3-VL: Qwen3 with three-axis rotary positions, the axes interleaved, and a tower whose layers feed the decoder's.

The tower's learned positions are stretched to an image's size. What some of its layers give is added to the outputs of
the decoder's first layers, at the image's tokens (DeepStack, Meng et al. 2024).
"""

from __future__ import annotations

import dataclasses
import math

from engine.families import qwen2_vl, qwen3
from engine.families.decoder import DecoderDefaults, decoder_weights, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Source, Weight, layer_norm, linear, plain
from engine.families.rope import MRope
from engine.families.section import Section
from engine.families.vision import ACTIVATIONS, read_norm
from engine.spec import DecoderSpec, ModelSpec, QwenVisionSpec

_DECODER: DecoderDefaults = dataclasses.replace(
    qwen3.DEFAULTS, theta=500_000.0, context_length=128_000, mrope=MRope((24, 20, 20), interleaved=True)
)
_NORM_EPS = 1e-6  # fixed in the reference implementation, not in the configuration


def _spec(config: CheckpointConfig) -> ModelSpec:
    model = Section(config.model)
    text = model.section("text_config")
    tied = model.boolean("tie_word_embeddings", False) or text.boolean("tie_word_embeddings", False)
    decoder = read_decoder(text, _DECODER, tied=tied)
    vision = read_tower(model.section("vision_config"), config, decoder, deepstack=(8, 16, 24))
    return ModelSpec(
        family="qwen3_vl",
        decoder=dataclasses.replace(decoder, deepstack=len(vision.deepstack)),
        tokens=read_tokens(
            config,
            model,
            text,
            image=model.integer("image_token_id", 151655),
            video=model.integer("video_token_id", 151656),
        ),
        vision=vision,
    )


def read_tower(
    vision: Section, config: CheckpointConfig, decoder: DecoderSpec, *, deepstack: tuple[int, ...]
) -> QwenVisionSpec:
    """`deepstack` is the family's default. Raises CheckpointError for what the graphs do not cover."""
    hidden = vision.integer("hidden_size", 1152)
    positions = vision.integer("num_position_embeddings", 2304)
    spec = QwenVisionSpec(
        layers=vision.integer("depth", 27),
        hidden=hidden,
        heads=vision.integer("num_heads", 16),
        intermediate=vision.integer("intermediate_size", 4304),
        norm_eps=_NORM_EPS,
        activation=vision.choice("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS),
        patch=vision.integer("patch_size", 16),
        temporal_patch=vision.integer("temporal_patch_size", 2),
        merge=vision.integer("spatial_merge_size", 2),
        norm=read_norm(config.preprocessor, qwen2_vl.NORM),
        position_side=math.isqrt(positions),
        deepstack=vision.integers("deepstack_visual_indexes", deepstack),
        timestamps=True,
    )
    if spec.position_side**2 != positions:
        raise vision.fail("num_position_embeddings", "the square of an integer")
    if spec.deepstack and (spec.deepstack[-1] >= spec.layers or len(spec.deepstack) > decoder.layers):
        raise vision.fail(
            "deepstack_visual_indexes",
            f"numbers below the tower's {spec.layers} layers, at most as many as the decoder's {decoder.layers} layers",
        )
    qwen2_vl.check_tower(vision, "hidden_size", spec, decoder)
    return spec


def _weights(spec: ModelSpec) -> tuple[Weight, ...]:
    assert isinstance(spec.vision, QwenVisionSpec)
    return (*tower_weights(spec.vision, spec.decoder.hidden), *decoder_weights(spec.decoder))


def tower_weights(vision: QwenVisionSpec, features: int) -> tuple[Weight, ...]:
    """Sources are spelled `vision.*`; `features` is the decoder's width."""
    kernel = (vision.hidden, 3, vision.temporal_patch, vision.patch, vision.patch)
    weights = [
        Weight("vision.patch.weight", "linear", (Source("vision.patch_embed.proj.weight", kernel),)),
        plain("vision.patch.bias", "vision.patch_embed.proj.bias", vision.hidden),
        plain("vision.position.weight", "vision.pos_embed.weight", vision.position_side**2, vision.hidden),
    ]
    for layer in range(vision.layers):
        weights += _layer_weights(vision, f"vision.layers.{layer}", f"vision.blocks.{layer}")
    merged = vision.hidden * vision.merge**2
    weights += layer_norm("vision.norm", "vision.merger.norm", vision.hidden)
    weights += _merger_weights("vision", "vision.merger", merged, features)
    for number in range(len(vision.deepstack)):
        name, source = f"vision.deepstack.{number}", f"vision.deepstack_merger_list.{number}"
        weights += layer_norm(f"{name}.norm", f"{source}.norm", merged)
        weights += _merger_weights(name, source, merged, features)
    return tuple(weights)


def _merger_weights(name: str, source: str, merged: int, features: int) -> tuple[Weight, ...]:
    return (
        *linear(f"{name}.merger", ((f"{source}.linear_fc1", merged),), merged),
        *linear(f"{name}.projection", ((f"{source}.linear_fc2", features),), merged),
    )


def _layer_weights(spec: QwenVisionSpec, name: str, source: str) -> list[Weight]:
    return [
        *layer_norm(f"{name}.attention_norm", f"{source}.norm1", spec.hidden),
        *linear(f"{name}.qkv", ((f"{source}.attn.qkv", 3 * spec.hidden),), spec.hidden),
        *linear(f"{name}.out", ((f"{source}.attn.proj", spec.hidden),), spec.hidden),
        *layer_norm(f"{name}.mlp_norm", f"{source}.norm2", spec.hidden),
        *linear(f"{name}.up", ((f"{source}.mlp.linear_fc1", spec.intermediate),), spec.hidden),
        *linear(f"{name}.down", ((f"{source}.mlp.linear_fc2", spec.hidden),), spec.intermediate),
    ]


FAMILY = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    prefixes=(("model.language_model.", "text."), ("model.visual.", "vision."), ("lm_head.", "head.")),
    spec=_spec,
    weights=_weights,
)
