"""Attention over the paged KV cache in Triton."""

from engine.kernels.attention.launch import PagedDecodeAttention
from engine.kernels.attention.parameters import AttentionParameters, AttentionTile, Split, default_tile, split_context

__all__ = ["AttentionParameters", "AttentionTile", "PagedDecodeAttention", "Split", "default_tile", "split_context"]
