"""SmolVLM and Idefics3: SigLIP tower, pixel shuffle connector, Llama decoder."""

from __future__ import annotations

import dataclasses

from engine.errors import CheckpointError
from engine.families import llama
from engine.families.decoder import decoder_weights, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Source, Weight, layer_norm, linear, plain
from engine.families.section import Section
from engine.families.vision import ACTIVATIONS, read_norm
from engine.spec import ModelSpec, PixelNorm, SiglipSpec

_DECODER = dataclasses.replace(llama.DEFAULTS, norm_eps=1e-5)


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
    vision = model.section("vision_config")
    spec = SiglipSpec(
        layers=vision.integer("num_hidden_layers", 12),
        hidden=vision.integer("hidden_size", 1152),
        heads=vision.integer("num_attention_heads", 16),
        intermediate=vision.integer("intermediate_size", 3072),
        norm_eps=vision.number("layer_norm_eps", 1e-6),
        activation=vision.choice("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS),
        tile=vision.integer("image_size", 224),
        patch=vision.integer("patch_size", 32),
        shuffle=model.integer("scale_factor", 2),
        norm=read_norm(config.preprocessor, PixelNorm()),
    )
    vision.divided("hidden_size", spec.hidden, spec.heads)
    if vision.integer("num_channels", 3) != 3:
        raise vision.fail("num_channels", "3")
    if (spec.tile // spec.patch) % spec.shuffle:
        raise CheckpointError(
            f"config.json: scale_factor {spec.shuffle} does not divide the {spec.tile // spec.patch} patches on a"
            f" side of a {spec.tile} pixel tile"
        )
    return spec


def _weights(spec: ModelSpec) -> tuple[Weight, ...]:
    vision = spec.vision
    assert isinstance(vision, SiglipSpec)
    patch = Source("vision.embeddings.patch_embedding.weight", (vision.hidden, 3, vision.patch, vision.patch))
    positions = (vision.tile // vision.patch) ** 2
    weights = [
        Weight("vision.patch.weight", "linear", (patch,)),
        plain("vision.patch.bias", "vision.embeddings.patch_embedding.bias", vision.hidden),
        plain("vision.position.weight", "vision.embeddings.position_embedding.weight", positions, vision.hidden),
    ]
    for layer in range(vision.layers):
        weights += _layer_weights(vision, f"vision.layers.{layer}", f"vision.encoder.layers.{layer}")
    weights += layer_norm("vision.norm", "vision.post_layernorm", vision.hidden)
    shuffled = vision.hidden * vision.shuffle**2
    projection = (("connector.modality_projection.proj", spec.decoder.hidden),)
    weights += linear("vision.projection", projection, shuffled, bias=False)
    return (*weights, *decoder_weights(spec.decoder))


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
