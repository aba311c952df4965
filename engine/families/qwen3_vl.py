"""Qwen3-VL's decoder: Qwen3 with three-axis rotary positions, the axes interleaved.

Its tower is not run yet: such a checkpoint is a model that reads text only.
"""

from __future__ import annotations

import dataclasses

from engine.families import qwen3
from engine.families.decoder import decoder_weights, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Weight
from engine.families.rope import MRope
from engine.families.section import Section
from engine.spec import ModelSpec

_DECODER = dataclasses.replace(
    qwen3.DEFAULTS, theta=500_000.0, context_length=128_000, mrope=MRope((24, 20, 20), interleaved=True)
)


def _spec(config: CheckpointConfig) -> ModelSpec:
    model = Section(config.model)
    text = model.section("text_config")
    tied = model.boolean("tie_word_embeddings", False) or text.boolean("tie_word_embeddings", False)
    decoder = read_decoder(text, _DECODER, tied=tied)
    return ModelSpec(family="qwen3_vl", decoder=decoder, tokens=read_tokens(config, model, text))


def _weights(spec: ModelSpec) -> tuple[Weight, ...]:
    return decoder_weights(spec.decoder)


FAMILY = Family(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    prefixes=(("model.language_model.", "text."), ("model.visual.", "vision."), ("lm_head.", "head.")),
    spec=_spec,
    weights=_weights,
)
