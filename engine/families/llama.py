"""Llama: text only."""

from __future__ import annotations

from engine.families.decoder import DecoderDefaults
from engine.families.text import text_family

DEFAULTS = DecoderDefaults(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=None,
    intermediate=11008,
    vocab=32000,
    norm_eps=1e-6,
    theta=10000.0,
    context_length=2048,
)

FAMILY = text_family("llama", DEFAULTS)
