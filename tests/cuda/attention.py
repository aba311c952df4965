"""Rotary embeddings and attention over packed sequences, in torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.cuda.operators import MICROSOFT, operator, wide


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, interleaved: bool = False) -> Tensor:
    """The first 2 * half channels of x [..., head_dim] turned by cosine and sine [..., half]."""
    half = cosine.shape[-1]
    turned, rest = wide(x)[..., : 2 * half], wide(x)[..., 2 * half :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    cosine, sine = wide(cosine), wide(sine)
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([joined, rest], -1).to(x.dtype)


def _heads(x: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """[B, S, heads * head_dim] or [B, heads, S, head_dim] to [B, S, heads, head_dim]."""
    return x.transpose(1, 2) if x.dim() == 4 else x.reshape(*x.shape[:2], num_heads or -1, head_dim)


def _head_dim(x: Tensor, cosine: Tensor, num_heads: int, rotary_embedding_dim: int) -> int:
    if x.dim() == 4:
        return x.shape[-1]
    if rotary_embedding_dim:
        assert num_heads, "rotary_embedding_dim needs num_heads"
        return x.shape[-1] // num_heads
    return 2 * cosine.shape[1]


def _like(turned: Tensor, x: Tensor) -> Tensor:
    return turned.transpose(1, 2).contiguous() if x.dim() == 4 else turned.reshape(x.shape)


@operator("RotaryEmbedding", MICROSOFT)
def _rotary(
    x: Tensor,
    position_ids: Tensor,
    cosine: Tensor,
    sine: Tensor,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    is_packed_batching: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """`position_ids` [1] is the first token's position, [B, S] are all."""
    assert x.dtype == cosine.dtype == sine.dtype
    assert position_ids.dtype == torch.int64
    heads = _heads(x, num_heads, _head_dim(x, cosine, num_heads, rotary_embedding_dim))
    if position_ids.dim() == 1:
        position_ids = (position_ids + torch.arange(heads.shape[1])).expand(heads.shape[:2])
    angles = (table[position_ids][:, :, None] for table in (cosine, sine))
    return _like(rotate(heads, *angles, interleaved=bool(interleaved)), x)


@operator("MRotaryEmbedding", MICROSOFT)
def _mrotary(
    x: Tensor,
    position_ids: Tensor,
    cosine: Tensor,
    sine: Tensor,
    *,
    mrope_section: Sequence[int],
    mrope_layout: int = 0,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    is_packed_batching: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """`position_ids` [3, B, S]: temporal, height, width."""
    assert x.dtype == cosine.dtype == sine.dtype
    assert position_ids.dtype == torch.int64
    assert sum(mrope_section) == cosine.shape[1]
    assert num_heads or x.dim() == 4
    heads = _heads(x, num_heads, _head_dim(x, cosine, num_heads, rotary_embedding_dim))
    axis = _axis_of_pair(mrope_section, mrope_layout)
    tables = (table[position_ids].movedim(0, -1) for table in (cosine, sine))  # [B, S, half, 3]
    angles = (table.gather(-1, axis.expand(table.shape[:-1])[..., None])[..., 0][:, :, None] for table in tables)
    return _like(rotate(heads, *angles, interleaved=bool(interleaved)), x)


def _axis_of_pair(section: Sequence[int], layout: int) -> Tensor:
    """[half]: which of the three positions turns each pair of channels."""
    if layout == 0:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    axis = torch.zeros(sum(section), dtype=torch.int64)
    for number in (1, 2):
        axis[number : section[number] * 3 : 3] = number
    return axis


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int = -1,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One sequence in fp32: query [Q, heads, D], key and value [K, kv_heads, D], the queries being the last Q keys."""
    queries, heads, dim = query.shape
    keys, kv_heads, _ = key.shape
    grouped = query.reshape(queries, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, key) * (scale or 1 / math.sqrt(dim))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.expand(heads, queries, keys).reshape(scores.shape)
    behind = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    if causal:
        scores = scores.masked_fill(behind < 0, -math.inf)
    if window >= 0:
        scores = scores.masked_fill(behind >= window, -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.float().reshape(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., :keys]
    return torch.einsum("hgqk,khd->qhgd", weights, value).reshape(queries, -1)


@operator("PackedMultiHeadAttention", MICROSOFT)
def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    token_offset: Tensor,
    cumulative: Tensor,
    *,
    num_heads: int,
    scale: float = 0.0,
    mask_filter_value: float = -10000.0,
) -> Tensor:
    """Separate query, key and value [T, heads * head_dim]; every token of a sequence sees all of it."""
    assert bias is None
    assert token_offset.dtype == cumulative.dtype == torch.int32
    assert query.dtype in (torch.float16, torch.float32), f"the operator has no kernel for {query.dtype}"
    ends = cumulative.tolist()
    count, longest = token_offset.shape
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    assert len(lengths) == count
    assert max(lengths) <= longest
    assert ends[0] == 0
    assert ends[-1] == len(query)
    real = [number * longest + place for number, length in enumerate(lengths) for place in range(length)]
    padding = sorted(set(range(count * longest)) - set(real))
    assert token_offset.flatten().tolist() == real + padding
    parts = [wide(x).reshape(len(x), num_heads, -1) for x in (query, key, value)]
    results = [
        attend(*(part[start:end] for part in parts), scale=scale, causal=False)
        for start, end in itertools.pairwise(ends)
    ]
    return torch.cat(results).to(query.dtype)


@operator("MultiHeadAttention", MICROSOFT)
def _multi_head_attention(query: Tensor, key: Tensor, value: Tensor, *, num_heads: int, scale: float = 0.0) -> Tensor:
    """[B, S, heads * head_dim], nothing masked."""
    parts = [wide(x).reshape(*x.shape[:2], num_heads, -1) for x in (query, key, value)]
    rows = [attend(*row, scale=scale, causal=False) for row in zip(*parts, strict=True)]
    return torch.stack(rows).to(query.dtype)


@operator("Attention")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    is_causal: int = 0,
    scale: float = 0.0,
    softcap: float = 0.0,
    softmax_precision: int = 1,
) -> Tensor:
    """[B, S, heads * head_dim] or [B, heads, S, head_dim]; a boolean `mask` is true where a token is seen."""
    counts = (q_num_heads, kv_num_heads, kv_num_heads)
    flat = query.dim() == 3
    parts = [
        wide(x).reshape(*x.shape[:2], count, -1) if flat else wide(x).transpose(1, 2)
        for x, count in zip((query, key, value), counts, strict=True)
    ]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    batch, length, heads = parts[0].shape[:3]
    keys = parts[1].shape[1]
    bias = None if mask is None else wide(mask).expand(batch, heads, length, keys)
    assert not is_causal or length == keys, "providers differ on how a shorter query is aligned"
    rows = [
        attend(*row, scale=scale, causal=bool(is_causal), softcap=softcap, bias=None if bias is None else bias[number])
        for number, row in enumerate(zip(*parts, strict=True))
    ]
    result = torch.stack(rows).to(query.dtype)
    return result if flat else result.reshape(batch, length, heads, -1).transpose(1, 2).contiguous()
