"""Attention over the paged KV cache in Triton."""

from engine.kernels.attention.launch import PagedDecodeAttention
from engine.kernels.attention.parameters import AttentionParameters, AttentionTile, default_tile, splits_of

__all__ = ["AttentionParameters", "AttentionTile", "PagedDecodeAttention", "default_tile", "splits_of"]
