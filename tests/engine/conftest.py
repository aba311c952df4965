"""Engines over the demo model and over tiny random models that have a tokenizer and a template of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from engine.config import EngineConfig
from engine.engine import Engine
from tests.prompts import checkpoints
from tests.prompts.checkpoints import Reference
from tests.runtime.models import randomise

Start = Callable[..., Engine]


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With models/tiny-smolvlm (splits images), tiny-qwen2-vl (any resolution, M-RoPE) and tiny-gemma3 (windows)."""
    folder = tmp_path_factory.mktemp("storage")
    _smolvlm(folder / "models" / "tiny-smolvlm")
    _qwen2_vl(folder / "models" / "tiny-qwen2-vl")
    gemma3 = checkpoints.gemma3(folder / "models" / "tiny-gemma3")
    randomise(tiny_gemma3(gemma3)).save_pretrained(gemma3.folder)
    return folder


@pytest.fixture
def start(storage: Path) -> Iterator[Start]:
    """Make engines on the shared storage; all are closed afterwards. The cache is off unless asked for."""
    engines: list[Engine] = []

    def started(**settings: Any) -> Engine:
        engine = Engine(EngineConfig.from_mapping({"storage": storage, "cache_enabled": False} | settings))
        engines.append(engine)
        return engine

    yield started
    for engine in engines:
        engine.close()


def _text(vocab: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }


def _smolvlm(folder: Path) -> None:
    reference = checkpoints.smolvlm(folder)
    tokenizer = reference.processor.tokenizer
    assert reference.spec.tokens.image is not None
    config = SmolVLMConfig(
        text_config={"model_type": "llama", "eos_token_id": tokenizer.eos_token_id, **_text(len(tokenizer))},
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 32,
            "patch_size": 4,
        },
        image_token_id=reference.spec.tokens.image,
        scale_factor=2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    randomise(SmolVLMForConditionalGeneration(config)).save_pretrained(folder)  # type: ignore[no-untyped-call]


def _qwen2_vl(folder: Path) -> None:
    reference = checkpoints.qwen2_vl(folder)
    tokenizer = reference.processor.tokenizer
    assert reference.spec.tokens.image is not None
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config=_text(len(tokenizer)) | {"rope_parameters": rope, "eos_token_id": tokenizer.eos_token_id},
        vision_config={"depth": 2, "embed_dim": 72, "hidden_size": 64, "num_heads": 3, "mlp_ratio": 2},
        image_token_id=reference.spec.tokens.image,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    randomise(Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)  # type: ignore[no-untyped-call]


def tiny_gemma3(reference: Reference) -> PreTrainedModel:
    """Windows of 24 tokens in two of three layers, which is less than an image and the words around it."""
    tokens = reference.spec.tokens
    config = Gemma3Config(
        text_config={
            **_text(len(reference.processor.tokenizer)),
            "num_hidden_layers": 3,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "eos_token_id": 1,
            "bos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 32,
            "patch_size": 4,
            "vision_use_head": False,
        },
        mm_tokens_per_image=16,
        image_token_index=tokens.image,
        boi_token_index=tokens.image_start,
        eoi_token_index=tokens.image_end,
    )
    return Gemma3ForConditionalGeneration(config)
