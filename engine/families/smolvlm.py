"""SmolVLM and Idefics3: SigLIP tower, pixel shuffle connector, Llama decoder."""

from __future__ import annotations

import dataclasses

from engine.errors import CheckpointError
from engine.families import llama
from engine.families.decoder import decoder_weights, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Weight, linear
from engine.families.section import Section
from engine.families.siglip import SiglipDefaults, read_siglip, siglip_weights
from engine.spec import ModelSpec, SiglipSpec

_DECODER = dataclasses.replace(llama.DEFAULTS, norm_eps=1e-5)
_TOWER = SiglipDefaults(hidden=1152, heads=16, patch=32)


def _spec(config: CheckpointConfig) -> ModelSpec:
    model = Section(config.model)
    text = model.section("text_config")
    text.choice("model_type", "llama", ("llama",))
    tied = model.boolean("tie_word_embeddings", False) or text.boolean("tie_word_embeddings", False)
    return ModelSpec(
        family="smolvlm",
        # Class defaults hold unless there is no text_config at all, for which Idefics3 has its own epsilon.
        decoder=read_decoder(text, llama.DEFAULTS if "text_config" in model else _DECODER, tied=tied),
        tokens=read_tokens(config, model, text, image=model.integer("image_token_id", 128257)),
        vision=_vision(model, config),
    )


def _vision(model: Section, config: CheckpointConfig) -> SiglipSpec:
    shuffle = model.integer("scale_factor", 2)
    spec = read_siglip(model.section("vision_config"), config.preprocessor, _TOWER, shuffle=shuffle)
    if (spec.tile // spec.patch) % spec.shuffle:
        raise CheckpointError(
            f"config.json: scale_factor {spec.shuffle} does not divide the {spec.tile // spec.patch} patches on a"
            f" side of a {spec.tile} pixel tile"
        )
    return spec


def _weights(spec: ModelSpec) -> tuple[Weight, ...]:
    vision = spec.vision
    assert isinstance(vision, SiglipSpec)
    shuffled = vision.hidden * vision.shuffle**2
    projection = (("connector.modality_projection.proj", spec.decoder.hidden),)
    return (
        *siglip_weights(vision),
        *linear("vision.projection", projection, shuffled, bias=False),
        *decoder_weights(spec.decoder),
    )


FAMILY = Family(
    name="smolvlm",
    model_types=("idefics3", "smolvlm"),
    prefixes=(
        ("model.text_model.", "text."),
        ("model.vision_model.", "vision."),
        ("model.connector.", "connector."),
        ("text_model.", "text."),
        ("vision_model.", "vision."),
        ("lm_head.", "head."),
    ),
    spec=_spec,
    weights=_weights,
)
