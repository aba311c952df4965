"""com.microsoft PagedAttention, in torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.cuda.attention import attend, rotate
from tests.cuda.operators import MICROSOFT, operator, wide

PAGED_ATTENTION = (MICROSOFT, "PagedAttention")
_BLOCK_SIZES = [1 << bits for bits in range(4, 12)]


@operator(PAGED_ATTENTION[1], PAGED_ATTENTION[0])
def _paged_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    cumulative: Tensor,
    past: Tensor,
    block_table: Tensor,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    head_sink: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    metadata: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    softcap: float = 0.0,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    is_causal: int = 1,
    local_window_size: int = -1,
    qk_norm_epsilon: float = 1e-6,
    k_quant_type: str = "NONE",
    v_quant_type: str = "NONE",
    k_cache_dtype: str = "",
    v_cache_dtype: str = "",
    kv_cache_layout: str = "SEPARATE",
) -> Sequence[Tensor]:
    """Tokens behind the last sequence's end come out as NaN; memory never written is never read."""
    assert kv_cache_layout == "SEPARATE"
    assert {x.dtype for x in (cumulative, past, block_table)} == {torch.int32}
    assert key_cache.shape[1] in _BLOCK_SIZES, f"blocks of {key_cache.shape[1]} tokens"
    ends, held, table = cumulative.tolist(), past.tolist(), block_table.long()
    _check(ends, held, table, key_cache, metadata, len(query))
    parts = _split_heads(query, key, value, num_heads, kv_num_heads, key_cache.shape[3])
    q, k, v = (part[: ends[-1]] for part in parts)
    if q_norm is not None and k_norm is not None:
        q, k = _norm(q, q_norm, qk_norm_epsilon), _norm(k, k_norm, qk_norm_epsilon)
    lengths = cumulative.long().diff()
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    places = torch.arange(ends[-1]) + (past - cumulative[:-1])[row]
    if do_rotary:
        assert cosine is not None
        assert sine is not None
        assert int(places.max()) < len(cosine), "a position beyond the rotary table"
        angles = cosine[places][:, None], sine[places][:, None]
        q, k = (rotate(x, *angles, interleaved=bool(rotary_interleaved)) for x in (q, k))
    block_size = key_cache.shape[1]
    slots = table[row, places // block_size] * block_size + places % block_size
    if slot_mapping is not None:
        slots = slot_mapping[: ends[-1]].long()
    scales = (k_scale if k_quant_type != "NONE" else None, v_scale if v_quant_type != "NONE" else None)
    _write(key_cache, slots, k, scales[0])
    _write(value_cache, slots, v, scales[1])
    output = torch.full((len(query), num_heads * v.shape[2]), torch.nan)
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        total = held[number] + end - start
        blocks = table[number, : -(-total // block_size)]
        if start < end:
            output[start:end] = attend(
                wide(q[start:end]),
                _read(key_cache, blocks, total, scales[0]),
                _read(value_cache, blocks, total, scales[1]),
                scale=scale,
                causal=bool(is_causal),
                window=local_window_size,
                softcap=softcap,
                sink=head_sink,
            )
    return output.to(query.dtype), key_cache, value_cache


def _split_heads(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, heads, head_dim] each."""
    if key is None or value is None:
        assert key is None
        assert value is None
        query, key, value = torch.split(query, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    assert query.dtype == key.dtype == value.dtype
    return (
        query.reshape(-1, heads, head_dim),
        key.reshape(-1, kv_heads, head_dim),
        value.reshape(-1, kv_heads, head_dim),
    )


def _check(
    ends: list[int], held: list[int], table: Tensor, cache: Tensor, metadata: Tensor | None, tokens: int
) -> None:
    """What the device trusts without looking."""
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    totals = [before + new for before, new in zip(held, lengths, strict=True)]
    assert sorted(ends) == ends, f"sequences end at {ends}"
    assert (ends[0], max(ends[-1], tokens)) == (0, tokens), f"sequences end at {ends} of {tokens} tokens"
    assert min(held, default=0) >= 0
    assert len(table) == len(lengths)
    for row, (new, total) in enumerate(zip(lengths, totals, strict=True)):
        used = table[row, : -(-total // cache.shape[1])] if new else table[row, :0]
        assert not new or total <= table.shape[1] * cache.shape[1], f"sequence {row} is longer than its block table"
        assert bool(((used >= 0) & (used < len(cache))).all()), f"sequence {row} has blocks that do not exist"
    if metadata is not None:
        assert metadata.dtype == torch.int32
        assert metadata.numel() in (2, 3)
        most, longest, *lower = metadata.tolist()
        assert not most or max(lengths, default=0) <= most, f"{max(lengths)} new tokens, bound {most}"
        assert not longest or max(totals, default=0) <= longest, f"{max(totals)} tokens, bound {longest}"
        assert not lower or max(totals, default=0) >= lower[0], f"{max(totals)} tokens, lower bound {lower[0]}"


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wider = wide(x)
    return (wider * torch.rsqrt(wider.square().mean(-1, keepdim=True) + epsilon) * wide(weight)).to(x.dtype)


def _write(cache: Tensor, slots: Tensor, rows: Tensor, scale: Tensor | None) -> None:
    """Rows [n, kv_heads, head_dim] to flat places; -1 is skipped."""
    kept = slots >= 0
    rows, slots = rows[kept], slots[kept]
    if scale is not None:
        rows = torch.clamp(torch.round(wide(rows) / _per_channel(scale)), -128, 127)
    flat = cache.view(-1, *cache.shape[2:])
    flat[slots] = rows.to(cache.dtype)


def _read(cache: Tensor, blocks: Tensor, total: int, scale: Tensor | None) -> Tensor:
    rows = cache[blocks].flatten(0, 1)[:total].float()
    return rows if scale is None else rows * _per_channel(scale)


def _per_channel(scale: Tensor) -> Tensor:
    """[1] or [kv_heads, 1, head_dim] to something that multiplies [n, kv_heads, head_dim]."""
    return scale if scale.numel() == 1 else scale.reshape(scale.shape[0], scale.shape[2])
