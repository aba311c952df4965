"""Qwen3: text only; queries and keys are normed head by head instead of biased."""

from __future__ import annotations

from engine.families.decoder import DecoderDefaults, decoder_weights, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Weight
from engine.families.section import Section
from engine.spec import ModelSpec

DEFAULTS = DecoderDefaults(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    intermediate=22016,
    vocab=151936,
    norm_eps=1e-6,
    theta=10000.0,
    context_length=32768,
    head_dim=128,
    qk_norm=True,
)


def _spec(config: CheckpointConfig) -> ModelSpec:
    text = Section(config.model)
    decoder = read_decoder(text, DEFAULTS, tied=text.boolean("tie_word_embeddings", False))
    return ModelSpec(family="qwen3", decoder=decoder, tokens=read_tokens(config, text))


def _weights(spec: ModelSpec) -> tuple[Weight, ...]:
    return decoder_weights(spec.decoder)


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    prefixes=(("model.", "text."), ("lm_head.", "head.")),
    spec=_spec,
    weights=_weights,
)
