"""Qwen2-VL: a tower for any resolution, a 2x2 merger, a Qwen2 decoder with three-axis rotary positions."""

from __future__ import annotations

from collections.abc import Callable

from engine.families.decoder import DecoderDefaults, decoder_weights, read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Source, Weight, layer_norm, linear
from engine.families.rope import MRope
from engine.families.section import Section
from engine.families.vision import ACTIVATIONS, read_norm
from engine.spec import DecoderSpec, ModelSpec, PixelNorm, QwenVisionSpec

DECODER = DecoderDefaults(
    layers=80,
    hidden=8192,
    heads=64,
    kv_heads=8,
    intermediate=29568,
    vocab=152064,
    norm_eps=1e-5,
    theta=1_000_000.0,
    context_length=32768,
    qkv_bias=True,
    mrope=MRope((16, 24, 24)),
)
# OpenAI CLIP's statistics, the default of Qwen2-VL's image processor.
NORM = PixelNorm(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
LayerWeights = Callable[[QwenVisionSpec, str, str], list[Weight]]
Norm = Callable[[str, str, int], tuple[Weight, ...]]
_VISION_NORM_EPS = 1e-6  # fixed in the reference implementation, not in the configuration


def _spec(config: CheckpointConfig) -> ModelSpec:
    model = Section(config.model)
    # Checkpoints before transformers 4.52 keep the text fields at the top level.
    text = model.section("text_config") if "text_config" in model else model
    tied = model.boolean("tie_word_embeddings", False) or text.boolean("tie_word_embeddings", False)
    return ModelSpec(
        family="qwen2_vl",
        decoder=read_decoder(text, DECODER, tied=tied),
        tokens=read_tokens(
            config,
            model,
            text,
            image=model.integer("image_token_id", 151655),
            video=model.integer("video_token_id", 151656),
        ),
        vision=_vision(model.section("vision_config"), config),
    )


def check_tower(vision: Section, width: str, spec: QwenVisionSpec, decoder: DecoderSpec | None = None) -> None:
    """`width` is the field that says the tower's. Raises CheckpointError for what the graphs do not cover."""
    head_dim = vision.divided(width, spec.hidden, spec.heads)
    if head_dim % 8:
        raise vision.fail("num_heads", f"such that a head has a multiple of 8 dimensions, not {head_dim}")
    if vision.integer("in_channels", 3) != 3:
        raise vision.fail("in_channels", "3")
    if decoder and vision.integer("out_hidden_size", decoder.hidden) != decoder.hidden:
        raise vision.fail("out_hidden_size", f"{decoder.hidden}, the text's hidden_size")


def _vision(vision: Section, config: CheckpointConfig) -> QwenVisionSpec:
    hidden = vision.integer("embed_dim", 1280)
    spec = QwenVisionSpec(
        layers=vision.integer("depth", 32),
        hidden=hidden,
        heads=vision.integer("num_heads", 16),
        intermediate=int(hidden * vision.number("mlp_ratio", 4)),
        norm_eps=_VISION_NORM_EPS,
        activation=vision.choice("hidden_act", "quick_gelu", ACTIVATIONS),
        patch=vision.integer("patch_size", 14),
        temporal_patch=vision.integer("temporal_patch_size", 2),
        merge=vision.integer("spatial_merge_size", 2),
        norm=read_norm(config.preprocessor, NORM),
    )
    check_tower(vision, "embed_dim", spec)
    return spec


def _weights(spec: ModelSpec) -> tuple[Weight, ...]:
    return model_weights(spec, _layer_weights, layer_norm)


def model_weights(spec: ModelSpec, layer_weights: LayerWeights, norm: Norm) -> tuple[Weight, ...]:
    """Of towers that differ in their blocks (artifact's and checkpoint's name given) and in the merger's norm."""
    vision = spec.vision
    assert isinstance(vision, QwenVisionSpec)
    kernel = (vision.hidden, 3, vision.temporal_patch, vision.patch, vision.patch)
    weights = [Weight("vision.patch.weight", "linear", (Source("vision.patch_embed.proj.weight", kernel),))]
    for layer in range(vision.layers):
        weights += layer_weights(vision, f"vision.layers.{layer}", f"vision.blocks.{layer}")
    merged = vision.hidden * vision.merge**2
    weights += [
        *norm("vision.norm", "vision.merger.ln_q", vision.hidden),
        *linear("vision.merger", (("vision.merger.mlp.0", merged),), merged),
        *linear("vision.projection", (("vision.merger.mlp.2", spec.decoder.hidden),), merged),
    ]
    return (*weights, *decoder_weights(spec.decoder))


def _layer_weights(spec: QwenVisionSpec, name: str, source: str) -> list[Weight]:
    return [
        *layer_norm(f"{name}.attention_norm", f"{source}.norm1", spec.hidden),
        *linear(f"{name}.qkv", ((f"{source}.attn.qkv", 3 * spec.hidden),), spec.hidden),
        *linear(f"{name}.out", ((f"{source}.attn.proj", spec.hidden),), spec.hidden),
        *layer_norm(f"{name}.mlp_norm", f"{source}.norm2", spec.hidden),
        *linear(f"{name}.up", ((f"{source}.mlp.fc1", spec.intermediate),), spec.hidden),
        *linear(f"{name}.down", ((f"{source}.mlp.fc2", spec.hidden),), spec.intermediate),
    ]


FAMILY = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    prefixes=(
        ("model.language_model.", "text."),
        ("model.visual.", "vision."),
        ("visual.", "vision."),
        ("model.", "text."),
        ("lm_head.", "head."),
    ),
    spec=_spec,
    weights=_weights,
)
