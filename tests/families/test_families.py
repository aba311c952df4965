"""Configurations as transformers writes them, now and before, become the same spec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Idefics3Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3VLConfig,
    SmolVLMConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.errors import CheckpointError
from engine.families import FAMILIES, CheckpointConfig, family_for
from engine.spec import DeltaNetSpec, ModelSpec, PixelNorm, QwenVisionSpec, SiglipSpec
from tests.runtime import models

TEXT_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}


def read(config: dict[str, Any], generation: Any = None, preprocessor: Any = None) -> ModelSpec:
    return family_for(config).spec(CheckpointConfig(config, generation or {}, preprocessor or {}))


def written(config: PreTrainedConfig) -> dict[str, Any]:
    """What save_pretrained puts into config.json."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return values


@pytest.mark.parametrize(
    "config_class",
    [
        LlamaConfig,
        Qwen2Config,
        SmolVLMConfig,
        Idefics3Config,
        Qwen2VLConfig,
        Qwen2_5_VLConfig,
        Qwen3Config,
        Qwen3VLConfig,
        Qwen3_5Config,
        Qwen3_5TextConfig,
    ],
)
def test_a_field_left_out_means_what_transformers_means(config_class: type[PreTrainedConfig]) -> None:
    # 224 pixels in patches of 32 make 7 on a side, which the default factor 2 does not divide in transformers either.
    spec = read({"model_type": config_class.model_type, "scale_factor": 7})
    text = config_class().get_text_config()
    for ours, theirs in TEXT_FIELDS.items():
        assert getattr(spec.decoder, ours) == getattr(text, theirs), ours
    assert spec.decoder.qkv_bias == (config_class in (Qwen2Config, Qwen2VLConfig, Qwen2_5_VLConfig))
    assert spec.decoder.qk_norm == (config_class in (Qwen3Config, Qwen3VLConfig, Qwen3_5Config, Qwen3_5TextConfig))
    assert spec.decoder.head_dim == getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    theta = text.rope_parameters["rope_theta"]
    width = spec.decoder.head_dim * text.rope_parameters.get("partial_rotary_factor", 1)
    assert spec.decoder.rope.width == width
    assert spec.decoder.rope.inv_freq[1] == pytest.approx(theta ** (-2 / width), rel=1e-6)


@pytest.mark.parametrize("config_class", [Qwen3_5Config, Qwen3_5TextConfig])
def test_linear_attention_left_out_means_what_transformers_means(config_class: type[PreTrainedConfig]) -> None:
    text: Any = config_class().get_text_config()
    decoder = read({"model_type": config_class.model_type}).decoder
    assert decoder.delta_net is not None
    assert decoder.delta_net == DeltaNetSpec(
        layers=tuple(layer for layer, kind in enumerate(text.layer_types) if kind == "linear_attention"),
        key_heads=text.linear_num_key_heads,
        value_heads=text.linear_num_value_heads,
        key_dim=text.linear_key_head_dim,
        value_dim=text.linear_value_head_dim,
        kernel=text.linear_conv_kernel_dim,
    )
    assert decoder.attention_layers == (3, 7, 11, 15, 19, 23, 27, 31)
    assert decoder.kv_values_per_token == 2 * 8 * 4 * 256
    assert decoder.delta_net.state_bytes == 4 * 24 * (32 * 128 * 128 + 3 * 8192)


def test_siglip_fields_left_out_mean_what_transformers_means() -> None:
    spec = read({"model_type": "idefics3", "vision_config": {"patch_size": 16}})
    theirs: Any = Idefics3Config(vision_config={"patch_size": 16})
    vision = theirs.vision_config
    assert spec.vision == SiglipSpec(
        layers=vision.num_hidden_layers,
        hidden=vision.hidden_size,
        heads=vision.num_attention_heads,
        intermediate=vision.intermediate_size,
        norm_eps=vision.layer_norm_eps,
        activation=vision.hidden_act,
        tile=224,
        patch=16,
        shuffle=theirs.scale_factor,
    )
    assert (spec.tokens.image, spec.tokens.video) == (theirs.image_token_id, None)


def test_qwen_vision_fields_left_out_mean_what_transformers_means() -> None:
    spec = read({"model_type": "qwen2_vl"})
    theirs: Any = Qwen2VLConfig()
    vision = theirs.vision_config
    assert isinstance(spec.vision, QwenVisionSpec)
    assert (spec.vision.layers, spec.vision.hidden, spec.vision.heads) == (32, 1280, 16)
    assert spec.vision.intermediate == vision.embed_dim * vision.mlp_ratio
    assert (spec.vision.patch, spec.vision.temporal_patch, spec.vision.merge) == (14, 2, 2)
    assert spec.vision.activation == vision.hidden_act
    assert spec.decoder.rope.mrope_section == (16, 24, 24)
    assert (spec.tokens.image, spec.tokens.video) == (theirs.image_token_id, theirs.video_token_id)


def test_qwen2_5_vision_fields_left_out_mean_what_transformers_means() -> None:
    spec = read({"model_type": "qwen2_5_vl"}).vision
    theirs: Any = Qwen2_5_VLConfig()
    vision = theirs.vision_config
    assert isinstance(spec, QwenVisionSpec)
    assert spec == QwenVisionSpec(
        layers=vision.depth,
        hidden=vision.hidden_size,
        heads=vision.num_heads,
        intermediate=vision.intermediate_size,
        norm_eps=1e-6,
        activation="silu_gate",
        patch=vision.patch_size,
        temporal_patch=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        norm=spec.norm,
        window=vision.window_size // vision.patch_size,
        full_attention=tuple(vision.fullatt_block_indexes),
        positions_per_second=vision.tokens_per_second,
    )
    assert [layer for layer in range(spec.layers) if not spec.is_windowed(layer)] == [7, 15, 23, 31]


def test_qwen3_vision_fields_left_out_mean_what_transformers_means() -> None:
    spec = read({"model_type": "qwen3_vl"})
    theirs: Any = Qwen3VLConfig()
    vision = theirs.vision_config
    assert isinstance(spec.vision, QwenVisionSpec)
    assert spec.vision == QwenVisionSpec(
        layers=vision.depth,
        hidden=vision.hidden_size,
        heads=vision.num_heads,
        intermediate=vision.intermediate_size,
        norm_eps=1e-6,
        activation=vision.hidden_act,
        patch=vision.patch_size,
        temporal_patch=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        norm=spec.vision.norm,
        position_side=48,
        deepstack=tuple(vision.deepstack_visual_indexes),
        timestamps=True,
    )
    assert spec.decoder.feature_width == 4 * spec.decoder.hidden
    assert (spec.tokens.image, spec.tokens.video) == (theirs.image_token_id, theirs.video_token_id)
    assert read({"model_type": "qwen3_vl", "vision_config": {"deepstack_visual_indexes": []}}).decoder.deepstack == 0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["default", "linear", "llama3"],
)
def test_rope_is_the_references_in_either_spelling(rope: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=512, rope_parameters=dict(rope)
    )
    new = written(config)
    reference = LlamaRotaryEmbedding(config)
    spec = read(new).decoder.rope
    torch.testing.assert_close(torch.tensor(spec.inv_freq), reference.inv_freq, rtol=1e-6, atol=0)
    assert spec.attention_scale == reference.attention_scaling
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling if rope["rope_type"] != "default" else None}
    assert read(old).decoder.rope == spec


def test_a_flat_qwen2_vl_configuration_is_read_as_the_nested_one() -> None:
    nested = written(models.qwen2_vl(num_key_value_heads=1).config)
    text = nested["text_config"]
    flat = {name: value for name, value in nested.items() if name != "text_config"}
    flat |= {name: value for name, value in text.items() if name not in ("model_type", "rope_parameters")}
    flat |= {
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": text["rope_parameters"]["mrope_section"]},
    }
    assert read(flat) == read(nested)
    assert read(nested).decoder.kv_heads == 1


def test_end_tokens_come_from_the_generation_configuration_first() -> None:
    config = {"model_type": "llama", "eos_token_id": 7}
    assert read(config).tokens.eos == (7,)
    assert read(config, {"eos_token_id": [3, 4]}).tokens.eos == (3, 4)
    assert read({"model_type": "llama"}).tokens.eos == ()
    assert read(config, {"eos_token_id": 5, "pad_token_id": 9}).tokens.pad == 9


def test_pixels_are_normalised_as_the_preprocessor_configuration_says() -> None:
    config = {"model_type": "smolvlm", "scale_factor": 7}
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 0.5}
    vision = read(config, preprocessor=said).vision
    assert vision is not None
    assert vision.norm == PixelNorm((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.5)
    vision = read(config, preprocessor=said | {"do_normalize": False, "do_rescale": False}).vision
    assert vision is not None
    assert vision.norm == PixelNorm((0, 0, 0), (1, 1, 1), 1.0)
    with pytest.raises(CheckpointError, match="image_mean"):
        read(config, preprocessor={"image_mean": 0.5})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba'; this engine runs ",
        ),
        ({}, "model_type None"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be one of silu"),
        ({"model_type": "llama", "num_hidden_layers": "six"}, "num_hidden_layers is 'six'"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"model_type": "llama", "rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"model_type": "llama", "num_attention_heads": 7}, "hidden_size is 4096, which 7 does not divide"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "num_attention_heads is 32, which 5 does not divide"),
        ({"model_type": "llama", "head_dim": 20}, "head_dim is 20; it must be a multiple of 16"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'"),
        ({"model_type": "llama", "rope_parameters": 3}, "rope_parameters is 3; it must be an object"),
        ({"model_type": "llama", "eos_token_id": "end"}, "eos_token_id"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding window"),
        ({"model_type": "qwen3_5_text", "layer_types": ["full_attention"] * 32}, "layer_types"),
        ({"model_type": "qwen3_5_text", "linear_num_value_heads": 24}, "is 24, which 16 does not divide"),
        ({"model_type": "qwen3_5_text", "rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor"),
        ({"model_type": "qwen3_5_text", "rope_parameters": {"mrope_section": [8, 8, 8]}}, "a head that turns, 32"),
        ({"model_type": "smolvlm", "text_config": {"model_type": "phi"}}, "text_config.model_type is 'phi'"),
        ({"model_type": "smolvlm", "scale_factor": 5}, "scale_factor 5 does not divide the 7 patches"),
        ({"model_type": "smolvlm", "vision_config": {"num_channels": 1}}, "vision_config.num_channels is 1"),
        (
            {"model_type": "qwen3_vl", "text_config": {"rope_scaling": {"mrope_interleaved": False}}},
            "mrope_interleaved is False; it must be true",
        ),
        ({"model_type": "qwen2_vl", "rope_scaling": {"mrope_section": [1, 2]}}, "add up to half of head_dim, 64"),
        (
            {"model_type": "qwen2_5_vl", "vision_config": {"window_size": 20}},
            "window_size is 20; it must be at least 28",
        ),
        ({"model_type": "qwen2_5_vl", "vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act is 'gelu'"),
        ({"model_type": "qwen3_vl", "vision_config": {"out_hidden_size": 8}}, "out_hidden_size is 8; it must be 4096"),
        ({"model_type": "qwen3_vl", "vision_config": {"num_position_embeddings": 50}}, "the square of an integer"),
        ({"model_type": "qwen3_vl", "vision_config": {"deepstack_visual_indexes": [3, 1]}}, "list of growing numbers"),
        (
            {"model_type": "qwen3_vl", "vision_config": {"deepstack_visual_indexes": [27]}},
            "below the tower's 27 layers",
        ),
        ({"model_type": "qwen3_vl", "text_config": {"num_hidden_layers": 2}}, "at most as many as the decoder's 2"),
    ],
)
def test_what_is_not_supported_is_said_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(config)
    assert message in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_tensor_that_transformers_saves_is_used_once(family: Any, tmp_path: Path) -> None:
    model = getattr(models, family.name)()
    spec = read(written(model.config))
    sources = [source.name for weight in family.weights(spec) for source in weight.sources]
    assert len(sources) == len(set(sources))
    names = {family.source_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if spec.decoder.tied_head:
        names.pop("head.weight")
    assert names == {source.name: source.shape for weight in family.weights(spec) for source in weight.sources}


@pytest.mark.parametrize(
    ("model_type", "stored", "wanted"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", "text.layers.0.mlp.up_proj.weight"),
        ("smolvlm", "model.text_model.norm.weight", "text.norm.weight"),
        ("smolvlm", "text_model.norm.weight", "text.norm.weight"),
        ("smolvlm", "vision_model.post_layernorm.bias", "vision.post_layernorm.bias"),
        ("smolvlm", "connector.modality_projection.proj.weight", "connector.modality_projection.proj.weight"),
        ("qwen2_vl", "visual.merger.ln_q.weight", "vision.merger.ln_q.weight"),
        ("qwen2_vl", "model.visual.merger.ln_q.weight", "vision.merger.ln_q.weight"),
        ("qwen2_vl", "model.norm.weight", "text.norm.weight"),
        ("qwen2_vl", "model.language_model.norm.weight", "text.norm.weight"),
        ("qwen2_vl", "lm_head.weight", "head.weight"),
        ("qwen3_vl", "model.language_model.layers.0.self_attn.q_norm.weight", "text.layers.0.self_attn.q_norm.weight"),
        ("qwen2_5_vl", "visual.blocks.0.mlp.up_proj.bias", "vision.blocks.0.mlp.up_proj.bias"),
        ("qwen2_5_vl", "model.visual.merger.mlp.2.bias", "vision.merger.mlp.2.bias"),
        ("qwen3_vl", "model.visual.pos_embed.weight", "vision.pos_embed.weight"),
        ("qwen3_5", "model.language_model.layers.0.linear_attn.A_log", "text.layers.0.linear_attn.A_log"),
        ("qwen3_5", "mtp.layers.0.mlp.up_proj.weight", "mtp.layers.0.mlp.up_proj.weight"),  # nobody asks for it
        ("qwen3_5_text", "model.layers.0.linear_attn.dt_bias", "text.layers.0.linear_attn.dt_bias"),
    ],
)
def test_old_and_new_prefixes_name_the_same_tensor(model_type: str, stored: str, wanted: str) -> None:
    assert family_for({"model_type": model_type}).source_name(stored) == wanted
