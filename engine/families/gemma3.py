"""Gemma 3: a SigLIP tower whose patches are averaged, and a decoder of sliding and global layers; also that alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from engine.families.decoder import DecoderDefaults, decoder_weights, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Source, Weight, plain
from engine.families.rope import read_rope
from engine.families.section import Section
from engine.families.siglip import SiglipDefaults, read_siglip, siglip_weights
from engine.spec import DecoderSpec, ModelSpec, RopeSpec, SiglipSpec, SlidingSpec

DEFAULTS = DecoderDefaults(
    layers=26,
    hidden=2304,
    heads=8,
    kv_heads=4,
    intermediate=9216,
    vocab=262208,
    norm_eps=1e-6,
    theta=1_000_000.0,
    context_length=131072,
    head_dim=256,
    qk_norm=True,
)
_TOWER = SiglipDefaults(hidden=768, heads=12, patch=16)
_LOCAL_THETA = 10000.0
_NORM_OFFSET = 1.0  # a norm multiplies by 1 + its stored weight


def _spec(config: CheckpointConfig) -> ModelSpec:
    model = Section(config.model)
    text = model.section("text_config")
    text.choice("model_type", "gemma3_text", ("gemma3_text",))
    tied = model.boolean("tie_word_embeddings", True) and text.boolean("tie_word_embeddings", True)
    tokens = read_tokens(config, model, text, image=_token(model, "image", 262144))
    start, end = _token(model, "boi", 255999), _token(model, "eoi", 256000)
    return ModelSpec(
        family="gemma3",
        decoder=dataclasses.replace(_decoder(text, tied=tied), mutual_images=True),
        tokens=dataclasses.replace(tokens, image_start=start, image_end=end),
        vision=_vision(model, config),
        wide_activations=True,
    )


def _token(model: Section, name: str, default: int) -> int:
    """transformers spells it either way."""
    return model.integer(f"{name}_token_index", model.integer(f"{name}_token_id", default))


def _vision(model: Section, config: CheckpointConfig) -> SiglipSpec:
    vision = model.section("vision_config")
    side = vision.integer("image_size", 224) // vision.integer("patch_size", _TOWER.patch)
    tokens = model.integer("mm_tokens_per_image", 256)
    tokens_side = math.isqrt(tokens)
    if tokens_side**2 != tokens or side % tokens_side:
        raise model.fail(
            "mm_tokens_per_image", f"the square of a number that divides the {side} patches on a side of an image"
        )
    return read_siglip(vision, config.preprocessor, _TOWER, shuffle=side // tokens_side, connector="mean")


def _text_spec(config: CheckpointConfig) -> ModelSpec:
    text = Section(config.model)
    decoder = _decoder(text, tied=text.boolean("tie_word_embeddings", True))
    return ModelSpec("gemma3_text", decoder, read_tokens(config, text), wide_activations=True)


def _decoder(text: Section, *, tied: bool) -> DecoderSpec:
    text.choice("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    if text.boolean("use_bidirectional_attention", False):
        raise text.fail("use_bidirectional_attention", "false (it makes an encoder, which writes no text)")
    if "attn_logit_softcapping" in text:
        raise text.fail("attn_logit_softcapping", "null (transformers does not apply it to this architecture either)")
    spec = read_decoder(text, DEFAULTS, tied=tied)
    return dataclasses.replace(
        spec,
        rope=_rope(text, "full_attention", spec),
        activation="gelu_pytorch_tanh",
        output_norms=True,
        scaled_embedding=True,
        query_scalar=text.number("query_pre_attn_scalar", 256.0),
        sliding=SlidingSpec(
            layers=_sliding_layers(text, spec.layers),
            window=text.integer("sliding_window", 4096),
            rope=_rope(text, "sliding_attention", spec),
        ),
        logit_softcap=text.number("final_logit_softcapping", 0.0),
    )


def _rope(text: Section, kind: str, spec: DecoderSpec) -> RopeSpec:
    """transformers 5 nests a section for each kind of layer; before, the global one had the usual fields."""
    theta = text.number("rope_theta", DEFAULTS.theta)
    if kind == "sliding_attention":
        theta = text.number("rope_local_base_freq", _LOCAL_THETA)
    parameters: Mapping[str, object] = {}
    if "rope_parameters" in text:
        nested = text.section("rope_parameters")
        nested.section(kind)
        parameters = nested.get(kind) or {}
    elif kind == "full_attention":
        text.section("rope_scaling")
        parameters = text.get("rope_scaling") or {}
    section = Section({"rope_parameters": parameters}, f"{kind}: ")
    return read_rope(section, spec.head_dim, theta=theta, context_length=spec.context_length)


def _sliding_layers(text: Section, layers: int) -> tuple[bool, ...]:
    kinds = text.get("layer_types")
    if kinds is None:  # older files say that every so many layers one is global
        pattern = text.integer("sliding_window_pattern", 6)
        return tuple((layer + 1) % pattern != 0 for layer in range(layers))
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(known):
        raise text.fail("layer_types", f"a list of {layers} of {' and '.join(known)}")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _weights(spec: ModelSpec) -> tuple[Weight, ...]:
    vision = spec.vision
    assert isinstance(vision, SiglipSpec)
    projection = Source("projector.mm_input_projection_weight", (vision.hidden, spec.decoder.hidden))
    return (
        *siglip_weights(vision),
        plain("vision.mean_norm.weight", "projector.mm_soft_emb_norm.weight", vision.hidden, offset=_NORM_OFFSET),
        Weight("vision.projection.weight", "linear", (projection,), transposed=True),
        *_text_weights(spec),
    )


def _text_weights(spec: ModelSpec) -> tuple[Weight, ...]:
    return decoder_weights(spec.decoder, norm_offset=_NORM_OFFSET)


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3",),
    prefixes=(
        ("model.language_model.", "text."),
        ("language_model.model.", "text."),
        ("language_model.lm_head.", "head."),
        ("model.vision_tower.vision_model.", "vision."),
        ("model.vision_tower.", "vision."),
        ("vision_tower.vision_model.", "vision."),
        ("vision_tower.", "vision."),
        ("model.multi_modal_projector.", "projector."),
        ("multi_modal_projector.", "projector."),
        ("lm_head.", "head."),
    ),
    spec=_spec,
    weights=_weights,
)
TEXT_FAMILY = Family(
    name="gemma3_text",
    model_types=("gemma3_text",),
    prefixes=(("model.", "text."), ("lm_head.", "head.")),
    spec=_text_spec,
    weights=_text_weights,
)
