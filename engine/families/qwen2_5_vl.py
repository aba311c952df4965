"""Qwen2.5-VL: Qwen2-VL whose tower attends in windows, but for some layers, and is built like a decoder.

Its blocks have RMS norms and a gated MLP, with biases everywhere.
"""

from __future__ import annotations

from engine.families import qwen2_vl
from engine.families.decoder import read_decoder, read_tokens
from engine.families.family import CheckpointConfig, Family, Weight, linear, plain
from engine.families.section import Section
from engine.families.vision import read_norm
from engine.spec import DecoderSpec, ModelSpec, QwenVisionSpec

_NORM_EPS = 1e-6  # fixed in the reference implementation, not in the configuration


def _spec(config: CheckpointConfig) -> ModelSpec:
    model = Section(config.model)
    # Checkpoints before transformers 4.52 keep the text fields at the top level.
    text = model.section("text_config") if "text_config" in model else model
    tied = model.boolean("tie_word_embeddings", False) or text.boolean("tie_word_embeddings", False)
    decoder = read_decoder(text, qwen2_vl.DECODER, tied=tied)
    return ModelSpec(
        family="qwen2_5_vl",
        decoder=decoder,
        tokens=read_tokens(
            config,
            model,
            text,
            image=model.integer("image_token_id", 151655),
            video=model.integer("video_token_id", 151656),
        ),
        vision=_vision(model.section("vision_config"), config, decoder),
    )


def _vision(vision: Section, config: CheckpointConfig, decoder: DecoderSpec) -> QwenVisionSpec:
    patch, merge = vision.integer("patch_size", 14), vision.integer("spatial_merge_size", 2)
    window = vision.integer("window_size", 112) // merge // patch
    if not window:
        raise vision.fail("window_size", f"at least {merge * patch}, the pixels on a side of a token")
    vision.choice("hidden_act", "silu", ("silu",))
    spec = QwenVisionSpec(
        layers=vision.integer("depth", 32),
        hidden=vision.integer("hidden_size", 3584),
        heads=vision.integer("num_heads", 16),
        intermediate=vision.integer("intermediate_size", 3420),
        norm_eps=_NORM_EPS,
        activation="silu_gate",
        patch=patch,
        temporal_patch=vision.integer("temporal_patch_size", 2),
        merge=merge,
        norm=read_norm(config.preprocessor, qwen2_vl.NORM),
        window=window * merge,
        full_attention=vision.integers("fullatt_block_indexes", (7, 15, 23, 31)),
        positions_per_second=vision.integer("tokens_per_second", 4),
    )
    qwen2_vl.check_tower(vision, "hidden_size", spec, decoder)
    return spec


def _weights(spec: ModelSpec) -> tuple[Weight, ...]:
    return qwen2_vl.model_weights(spec, _layer_weights, _rms_norm)


def _rms_norm(name: str, module: str, size: int) -> tuple[Weight, ...]:
    return (plain(f"{name}.weight", f"{module}.weight", size),)


def _layer_weights(spec: QwenVisionSpec, name: str, source: str) -> list[Weight]:
    gate_up = tuple((f"{source}.mlp.{part}_proj", spec.intermediate) for part in ("gate", "up"))
    return [
        *_rms_norm(f"{name}.attention_norm", f"{source}.norm1", spec.hidden),
        *linear(f"{name}.qkv", ((f"{source}.attn.qkv", 3 * spec.hidden),), spec.hidden),
        *linear(f"{name}.out", ((f"{source}.attn.proj", spec.hidden),), spec.hidden),
        *_rms_norm(f"{name}.mlp_norm", f"{source}.norm2", spec.hidden),
        *linear(f"{name}.up", gate_up, spec.hidden),
        *linear(f"{name}.down", ((f"{source}.mlp.down_proj", spec.hidden),), spec.intermediate),
    ]


FAMILY = Family(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    prefixes=qwen2_vl.FAMILY.prefixes,
    spec=_spec,
    weights=_weights,
)
