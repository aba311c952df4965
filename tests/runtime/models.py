"""Tiny models with random weights, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

IMAGE_TOKEN = 97
VOCAB = 101
CONTEXT = 256


def _text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | changes


def _siglip() -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 4,
    }


def smolvlm(**text: Any) -> PreTrainedModel:
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **_text(**text)},
        vision_config=_siglip(),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        tie_word_embeddings=True,
    )
    return SmolVLMForConditionalGeneration(config)  # type: ignore[no-untyped-call]


def idefics3() -> PreTrainedModel:
    config = Idefics3Config(
        text_config={"model_type": "llama", **_text(num_key_value_heads=4)},
        vision_config=_siglip() | {"image_size": 26},
        image_token_id=IMAGE_TOKEN,
        scale_factor=3,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return Idefics3ForConditionalGeneration(config)  # type: ignore[no-untyped-call]


def qwen2_vl(**text: Any) -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=_text(rope_parameters=rope, **text),
        vision_config={
            "depth": 2,
            "embed_dim": 72,
            "hidden_size": 64,
            "num_heads": 3,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=98,
        vision_start_token_id=95,
        vision_end_token_id=96,
    )
    return Qwen2VLForConditionalGeneration(config)  # type: ignore[no-untyped-call]


def qwen2_5_vl(**text: Any) -> PreTrainedModel:
    """Windows of 4 x 4 patches, and one layer that sees the whole image."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config=_text(rope_parameters=rope, **text),
        vision_config={
            "depth": 3,
            "hidden_size": 72,
            "out_hidden_size": 64,
            "intermediate_size": 60,
            "num_heads": 3,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=98,
        vision_start_token_id=95,
        vision_end_token_id=96,
    )
    return Qwen2_5_VLForConditionalGeneration(config)  # type: ignore[no-untyped-call]


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_text(**changes)))  # type: ignore[no-untyped-call]


def qwen2(**changes: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_text(**changes)))  # type: ignore[no-untyped-call]


def qwen3(**changes: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_text(head_dim=32, **changes)))  # type: ignore[no-untyped-call]


def qwen3_vl(**text: Any) -> PreTrainedModel:
    """Two of the tower's layers feed the decoder's; learned positions of a square that fits no image."""
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    tower = {"depth": 4, "hidden_size": 72, "intermediate_size": 80, "num_heads": 3, "patch_size": 4}
    config = Qwen3VLConfig(
        text_config=_text(rope_parameters=rope, head_dim=16, **text),
        vision_config=tower
        | {"out_hidden_size": 64, "num_position_embeddings": 49, "deepstack_visual_indexes": [1, 3]},
        image_token_id=IMAGE_TOKEN,
        video_token_id=98,
        vision_start_token_id=95,
        vision_end_token_id=96,
    )
    return Qwen3VLForConditionalGeneration(config)  # type: ignore[no-untyped-call]


def gemma3_text(**changes: Any) -> PreTrainedModel:
    """Windows of 12 tokens in two of three layers; the global one's positions are scaled."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**_gemma3(layer_types=kinds, num_hidden_layers=3, **changes))
    return Gemma3ForCausalLM(config)


def gemma3(**text: Any) -> PreTrainedModel:
    """Images of 16 tokens, more than the sliding layers' window holds; patches are averaged by twos."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3Config(
        text_config=_gemma3(layer_types=kinds, num_hidden_layers=3, **text),
        vision_config=_siglip() | {"vision_use_head": False},
        mm_tokens_per_image=16,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=95,
        eoi_token_index=96,
    )
    return Gemma3ForConditionalGeneration(config)


def _gemma3(**changes: Any) -> dict[str, Any]:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    }
    small = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 12, "rope_parameters": rope}
    return _text(**small | changes)


def _qwen3_5_text(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
    small = {
        "head_dim": 32,
        "num_hidden_layers": 5,  # after the layer of full attention, a linear one again
        "rope_parameters": rope | {"partial_rotary_factor": 0.25},
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
    }
    return _text(**small | changes)


def qwen3_5_text(**changes: Any) -> PreTrainedModel:
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_qwen3_5_text(**changes)))  # type: ignore[no-untyped-call]


def qwen3_5(**text: Any) -> PreTrainedModel:
    tower = {"depth": 2, "hidden_size": 72, "intermediate_size": 80, "num_heads": 3, "patch_size": 4}
    config = Qwen3_5Config(
        text_config=_qwen3_5_text(**text),
        vision_config=tower | {"out_hidden_size": 64, "num_position_embeddings": 49},
        image_token_id=IMAGE_TOKEN,
        video_token_id=98,
        vision_start_token_id=95,
        vision_end_token_id=96,
    )
    return Qwen3_5ForConditionalGeneration(config)  # type: ignore[no-untyped-call]


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Large enough weights that every part shows in the logits; norms and biases away from where they begin.

    That is one for most norms, and zero where a norm multiplies by one more than its weight.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                begins_at_one = "norm" in name and name.endswith("weight") and bool((parameter == 1).all())
                parameter.copy_(noise * 0.2 + float(begins_at_one))
            else:
                parameter.copy_(noise * (parameter.shape[-1] if parameter.dim() == 2 else 48) ** -0.5)
    model.train(False)
    return model


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder
