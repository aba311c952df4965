"""Qwen3: text only; queries and keys are normed head by head instead of biased."""

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
    head_dim=128,
    qk_norm=True,
)

FAMILY = text_family("qwen3", DEFAULTS)
