"""The operators of domain `tessera`, in torch: what engine/kernels computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from engine.graphs.builder import TESSERA
from tests.cuda.attention import _mrotary
from tests.cuda.operators import operator, wide
from tests.cuda.paged_attention import _norm, _paged_attention


@operator("TokenEmbedding", TESSERA)
def _token_embedding(
    ids: Tensor,
    slot_tokens: Tensor,
    table: Tensor,
    scale: Tensor,
    feature_index: Tensor,
    features: Tensor,
    *,
    parameters: str,
) -> Tensor:
    assert json.loads(parameters) == {}
    tokens = torch.where(ids < 0, slot_tokens[(-1 - ids).clamp(min=0).long()], ids).long()
    rows = (table[tokens].float() * scale[tokens, None]).to(features.dtype)
    return torch.where(feature_index[:, None] < 0, rows, features[feature_index.clamp(min=0).long()])


@operator("Linear", TESSERA)
def _linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    parameters: str,
) -> Tensor:
    """Activations are quantised however few rows there are, unless the path is float."""
    asked = json.loads(parameters)
    rows = _normed(x, norm_weight, norm_bias, asked["norm"], asked["epsilon"])
    rows = wide(rows)
    if asked["path"] != "float":
        steps = rows.abs().amax(-1, keepdim=True) / 127
        rows = torch.where(steps > 0, torch.round(rows / steps), 0) * steps
    y = rows @ (weight.float() * scale[:, None]).T
    y = y if bias is None else y + wide(bias)
    y = _ACTIVATIONS[asked["activation"]](y)
    return (y if residual is None else y + wide(residual)).to(x.dtype)


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, epsilon: float) -> Tensor:
    assert (norm == "none") == (weight is None)
    if weight is None:
        assert bias is None
        return x
    if norm == "rms":
        assert bias is None
        return _norm(x, weight, epsilon)
    shift = None if bias is None else wide(bias)
    return functional.layer_norm(wide(x), (x.shape[-1],), wide(weight), shift, epsilon).to(x.dtype)


def _gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return functional.silu(gate) * up


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu_gate": _gated,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
}


@operator("PagedDecode", TESSERA)
def _paged_decode(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    past: Tensor,
    block_table: Tensor,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    parameters: str,
) -> Tensor:
    """PagedAttention for one token of each sequence; three-axis rotary embedding comes before it."""
    asked = json.loads(parameters)
    heads, kv_heads, head_dim = (int(asked[name]) for name in ("heads", "kv_heads", "head_dim"))
    query, key, value = torch.split(qkv, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    norms = (query_norm, key_norm)
    if positions is not None:
        parts = [(query, heads, query_norm), (key, kv_heads, key_norm)]
        query, key = (_turned(*part, positions, cosine, sine, asked) for part in parts)
        norms = (None, None)
    quantised = "NONE" if key_scale is None else "PER_CHANNEL"
    output = _paged_attention(
        *(query, key, value, key_cache, value_cache),
        torch.arange(len(qkv) + 1, dtype=torch.int32),
        *(past, block_table),
        *((cosine, sine) if positions is None else (None, None)),
        *(None, None, *norms, key_scale, value_scale, None),
        num_heads=heads,
        kv_num_heads=kv_heads,
        do_rotary=int(positions is None),
        qk_norm_epsilon=asked["qk_norm_epsilon"] or 0.0,
        k_quant_type=quantised,
        v_quant_type=quantised,
    )[0]
    assert isinstance(output, Tensor)
    return output


def _turned(
    x: Tensor,
    heads: int,
    norm: Tensor | None,
    positions: Tensor,
    cosine: Tensor,
    sine: Tensor,
    asked: dict[str, object],
) -> Tensor:
    rows = x.view(len(x), heads, -1)
    if norm is not None:
        rows = _norm(rows, norm, float(str(asked["qk_norm_epsilon"])))
    section = [int(pairs) for pairs in asked["mrope_section"]]  # type: ignore[attr-defined]
    turned = _mrotary(
        rows.reshape(1, len(x), -1),
        positions[:, None].long(),
        *(cosine, sine),
        mrope_section=section,
        mrope_layout=int(bool(asked["mrope_interleaved"])),
        num_heads=heads,
    )
    assert isinstance(turned, Tensor)
    return turned[0]
