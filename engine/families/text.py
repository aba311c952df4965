"""A family that is the shared decoder alone, in the layout that transformers gives all of them."""

from __future__ import annotations

from engine.families.decoder import DecoderDefaults, decoder_weights, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family
from engine.families.section import Section
from engine.spec import ModelSpec


def text_family(name: str, defaults: DecoderDefaults) -> Family:
    """`name` is also the model_type in config.json."""

    def spec(config: CheckpointConfig) -> ModelSpec:
        text = Section(config.model)
        decoder = read_decoder(text, defaults, tied=text.boolean("tie_word_embeddings", False))
        return ModelSpec(family=name, decoder=decoder, tokens=read_tokens(config, text))

    return Family(
        name=name,
        model_types=(name,),
        prefixes=(("model.", "text."), ("lm_head.", "head.")),
        spec=spec,
        weights=lambda model: decoder_weights(model.decoder),
    )
