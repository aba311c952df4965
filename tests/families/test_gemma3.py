"""Gemma 3's configurations, as transformers writes them now and before."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from engine.errors import CheckpointError
from engine.families import CheckpointConfig, family_for
from engine.spec import ModelSpec, SiglipSpec


def read(config: dict[str, Any]) -> ModelSpec:
    return family_for(config).spec(CheckpointConfig(config, {}, {}))


def read_text(**values: Any) -> ModelSpec:
    return read({"model_type": "gemma3_text"} | values)


def written(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return values


def test_a_field_left_out_means_what_transformers_means() -> None:
    spec, theirs = read_text().decoder, Gemma3TextConfig()
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads) == (26, 2304, 8, 4)
    assert (spec.head_dim, spec.intermediate, spec.vocab) == (theirs.head_dim, theirs.intermediate_size, 262208)
    assert (spec.norm_eps, spec.context_length) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert spec.score_scale == theirs.query_pre_attn_scalar**-0.5
    assert spec.tied_head
    assert spec.qk_norm
    assert spec.sliding is not None
    assert spec.sliding.window == theirs.sliding_window
    assert theirs.layer_types is not None
    assert spec.sliding.layers == tuple(kind == "sliding_attention" for kind in theirs.layer_types)


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 2_000.0, "rope_local_base_freq": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2, "num_hidden_layers": 5},
    ],
)
def test_older_files_say_the_same(old: dict[str, Any]) -> None:
    config = Gemma3TextConfig(**old)
    spec = read_text(**old).decoder
    reference = Gemma3RotaryEmbedding(config)
    assert spec.sliding is not None
    for ours, theirs in ((spec.rope, "full_attention_inv_freq"), (spec.sliding.rope, "sliding_attention_inv_freq")):
        torch.testing.assert_close(torch.tensor(ours.inv_freq), getattr(reference, theirs), rtol=1e-6, atol=0)
    new = read(written(config)).decoder
    assert new == spec


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": ["sliding_attention"]}, "layer_types is ['sliding_attention']; it must be a list of 26 of"),
        ({"layer_types": ["chunked_attention"] * 26}, "sliding_attention and full_attention"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True; it must be false"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type is 'yarn'"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be a positive integer"),
    ],
)
def test_what_is_not_supported_is_said_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_text(**config)
    assert message in str(caught.value)


def test_vision_fields_left_out_mean_what_transformers_means() -> None:
    spec = read({"model_type": "gemma3", "vision_config": {"image_size": 896, "patch_size": 14}})
    theirs = Gemma3Config(vision_config=SiglipVisionConfig(image_size=896, patch_size=14))
    vision: Any = theirs.vision_config
    assert isinstance(spec.vision, SiglipSpec)
    assert (spec.vision.layers, spec.vision.hidden) == (vision.num_hidden_layers, vision.hidden_size)
    assert (spec.vision.heads, spec.vision.intermediate) == (vision.num_attention_heads, vision.intermediate_size)
    assert (spec.vision.norm_eps, spec.vision.activation) == (vision.layer_norm_eps, vision.hidden_act)
    assert (spec.vision.connector, spec.vision.shuffle, spec.vision.tokens_per_tile) == ("mean", 4, 256)
    tokens = (theirs.image_token_index, theirs.boi_token_index, theirs.eoi_token_index)
    assert (spec.tokens.image, spec.tokens.image_start, spec.tokens.image_end) == tokens
    assert spec.decoder.mutual_images
    assert spec.half == "bfloat16"
    assert not read_text().decoder.mutual_images


RELEASED: dict[str, Any] = {
    "model_type": "gemma3",
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
"""As the 4B model is published: by an older transformers, with most fields left out."""


def test_the_released_configuration_is_read_as_transformers_reads_it() -> None:
    spec, theirs = read(RELEASED), Gemma3Config(**{k: v for k, v in RELEASED.items() if k != "model_type"})
    text: Any = theirs.text_config
    reference = Gemma3RotaryEmbedding(text)
    decoder = spec.decoder
    assert decoder.sliding is not None
    assert isinstance(spec.vision, SiglipSpec)
    for ours, buffer in ((decoder.rope, "full_attention"), (decoder.sliding.rope, "sliding_attention")):
        wanted = getattr(reference, f"{buffer}_inv_freq")
        torch.testing.assert_close(torch.tensor(ours.inv_freq), wanted, rtol=1e-6, atol=0)
    assert decoder.sliding.layers == tuple(kind == "sliding_attention" for kind in text.layer_types)
    assert decoder.sliding.layers.count(False) == 5
    assert (decoder.layers, decoder.heads, decoder.kv_heads, decoder.head_dim) == (34, 8, 4, 256)
    assert (decoder.sliding.window, decoder.score_scale, decoder.vocab) == (1024, 256**-0.5, 262208)
    assert spec.tokens.eos == (1, 106)
    assert (spec.vision.layers, spec.vision.hidden // spec.vision.heads) == (27, 72)
    assert (spec.vision.tokens_per_tile, spec.vision.shuffle) == (256, 4)


@pytest.mark.parametrize("tokens", [255, 225, 4225])
def test_an_images_tokens_must_be_a_square_that_fits_its_patches(tokens: int) -> None:
    config = {"model_type": "gemma3", "vision_config": {"image_size": 896, "patch_size": 14}}
    with pytest.raises(CheckpointError, match=f"mm_tokens_per_image is {tokens}.*64 patches"):
        read(config | {"mm_tokens_per_image": tokens})


@pytest.mark.parametrize(
    ("stored", "source"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "text.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "text.norm.weight"),
        ("vision_tower.vision_model.post_layernorm.bias", "vision.post_layernorm.bias"),
        ("model.vision_tower.post_layernorm.bias", "vision.post_layernorm.bias"),
        ("multi_modal_projector.mm_soft_emb_norm.weight", "projector.mm_soft_emb_norm.weight"),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", "projector.mm_soft_emb_norm.weight"),
        ("language_model.lm_head.weight", "head.weight"),
    ],
)
def test_tensors_are_found_under_old_names_and_new(stored: str, source: str) -> None:
    assert family_for({"model_type": "gemma3"}).source_name(stored) == source


def test_a_cap_on_logits_is_read() -> None:
    assert read_text(final_logit_softcapping=30.0).decoder.logit_softcap == 30.0
