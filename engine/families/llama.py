"""Llama: text only."""

from __future__ import annotations

from engine.families.decoder import DecoderDefaults, decoder_weights, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Weight
from engine.families.section import Section
from engine.spec import ModelSpec

DEFAULTS = DecoderDefaults(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=None,
    intermediate=11008,
    vocab=32000,
    norm_eps=1e-6,
    theta=10000.0,
    context_length=2048,
)


def _spec(config: CheckpointConfig) -> ModelSpec:
    text = Section(config.model)
    decoder = read_decoder(text, DEFAULTS, tied=text.boolean("tie_word_embeddings", False))
    return ModelSpec(family="llama", decoder=decoder, tokens=read_tokens(config, text))


def _weights(spec: ModelSpec) -> tuple[Weight, ...]:
    return decoder_weights(spec.decoder)


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    prefixes=(("model.", "text."), ("lm_head.", "head.")),
    spec=_spec,
    weights=_weights,
)
