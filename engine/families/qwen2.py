"""Qwen2 and Qwen2.5: text only; biases on queries, keys and values."""

from __future__ import annotations

from engine.families.decoder import DecoderDefaults
from engine.families.text import text_family

DEFAULTS = DecoderDefaults(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=32,
    intermediate=22016,
    vocab=151936,
    norm_eps=1e-6,
    theta=10000.0,
    context_length=32768,
    qkv_bias=True,
)

FAMILY = text_family("qwen2", DEFAULTS)
