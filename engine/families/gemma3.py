"""Gemma 3: a SigLIP tower whose patches are averaged, and a decoder of sliding and global layers; also that alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from engine.families.decoder import DecoderDefaults, decoder_weights, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Weight
from engine.families.rope import read_rope
from engine.families.section import Section
from engine.spec import DecoderSpec, ModelSpec, RopeSpec, SlidingSpec

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
_LOCAL_THETA = 10000.0
_NORM_OFFSET = 1.0  # a norm multiplies by 1 + its stored weight


def _text_spec(config: CheckpointConfig) -> ModelSpec:
    text = Section(config.model)
    return ModelSpec("gemma3_text", read_gemma_decoder(text), read_tokens(config, text))


def read_gemma_decoder(text: Section) -> DecoderSpec:
    text.choice("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    if text.boolean("use_bidirectional_attention", False):
        raise text.fail("use_bidirectional_attention", "false (it makes an encoder, which writes no text)")
    if "attn_logit_softcapping" in text:
        raise text.fail("attn_logit_softcapping", "null (transformers does not apply it to this architecture either)")
    spec = read_decoder(text, DEFAULTS, tied=text.boolean("tie_word_embeddings", True))
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


def _text_weights(spec: ModelSpec) -> tuple[Weight, ...]:
    return decoder_weights(spec.decoder, norm_offset=_NORM_OFFSET)


TEXT_FAMILY = Family(
    name="gemma3_text",
    model_types=("gemma3_text",),
    prefixes=(("model.", "text."), ("lm_head.", "head.")),
    spec=_text_spec,
    weights=_text_weights,
)
