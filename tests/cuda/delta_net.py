"""ONNX Runtime's operators of linear attention on CUDA, in torch, as their schemas describe them.

`GatedDeltaNet` and `VarlenCausalConvWithState` have no kernel on the CPU provider: they are computed token by token, in
the plainest way.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from tests.cuda.operators import MICROSOFT, operator, wide

GATED_DELTA_NET = (MICROSOFT, "GatedDeltaNet")
VARLEN_CONV = (MICROSOFT, "VarlenCausalConvWithState")
_UNIT_EPS = 1e-12


@operator("GatedDeltaNet", MICROSOFT)
def gated_delta_net(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    starts: Tensor,
    decay: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    *,
    update_rule: str = "gated_delta",
    gate_activation: str = "none",
    beta_activation: str = "none",
    qk_l2_norm: int = 0,
    scale: float = 0.0,
    chunk_size: int = 64,
) -> Sequence[Tensor]:
    """Packed queries, keys and values only, [T, 2 * heads_q * dk + heads_v * dv]; states [B, heads_v, dv, dk] fp32."""
    assert key is None
    assert value is None
    assert (update_rule, gate_activation, beta_activation) == ("gated_delta", "qwen", "sigmoid")
    assert initial_state.dtype == decay.dtype == beta.dtype == a_log.dtype == dt_bias.dtype == torch.float32
    batch, heads, dv, dk = initial_state.shape
    assert starts.dtype == torch.int32
    assert starts.shape == (batch + 1,)
    assert decay.shape == beta.shape == (len(query), heads)
    assert a_log.shape == dt_bias.shape == (heads,)
    shared, rest = divmod(query.shape[1] - heads * dv, 2 * dk)
    assert rest == 0
    assert heads % shared == 0
    parts = torch.split(wide(query), [shared * dk, shared * dk, heads * dv], 1)
    q, k = (_unit(part.reshape(-1, shared, dk), qk_l2_norm).repeat_interleave(heads // shared, 1) for part in parts[:2])
    v = parts[2].reshape(-1, heads, dv)
    kept = torch.exp(-torch.exp(a_log) * functional.softplus(decay + dt_bias))
    rate = torch.sigmoid(beta)
    output, state = torch.full((len(query), heads, dv), torch.nan), initial_state.clone()
    for row, (start, stop) in enumerate(_ranges(starts, len(query))):
        for token in range(start, stop):
            decayed = state[row] * kept[token][:, None, None]
            found = torch.einsum("hvk,hk->hv", decayed, k[token])
            change = rate[token][:, None] * (v[token] - found)
            state[row] = decayed + change[:, :, None] * k[token][:, None, :]
            output[token] = torch.einsum("hvk,hk->hv", state[row], q[token])
    return (output * (scale or dk**-0.5)).to(query.dtype), state


@operator("VarlenCausalConvWithState", MICROSOFT)
def varlen_conv(
    x: Tensor,
    weight: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    *,
    activation: str = "none",
) -> Sequence[Tensor]:
    """[T, channels], states [B, channels, kernel - 1] of the same type."""
    assert bias is None
    assert activation == "silu"
    assert x.dtype == weight.dtype == initial_state.dtype
    channels, one, kernel = weight.shape
    assert one == 1
    assert starts.dtype == torch.int32
    assert initial_state.shape == (len(starts) - 1, channels, kernel - 1)
    output, states = torch.full(x.shape, torch.nan), []
    for row, (start, stop) in enumerate(_ranges(starts, len(x))):
        window = torch.cat([initial_state[row], x[start:stop].T], 1)
        convolved = functional.conv1d(wide(window)[None], wide(weight), groups=channels)[0]
        output[start:stop] = functional.silu(convolved).T
        states.append(window[:, window.shape[1] - kernel + 1 :])
    return output.to(x.dtype), torch.stack(states)


@operator("GatedRMSNorm", MICROSOFT)
def gated_rms_norm(
    x: Tensor, weight: Tensor, gate: Tensor, *, epsilon: float = 1e-5, activation: str = "silu"
) -> Tensor:
    assert x.dtype == weight.dtype == gate.dtype
    assert x.shape == gate.shape
    assert activation == "silu"
    rows = wide(x).reshape(*x.shape[:-1], -1, len(weight))
    normed = rows * torch.rsqrt((rows * rows).mean(-1, keepdim=True) + epsilon) * wide(weight)
    return (normed.reshape(x.shape) * functional.silu(wide(gate))).to(x.dtype)


def _unit(x: Tensor, wanted: int) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _UNIT_EPS) if wanted else x


def _ranges(starts: Tensor, tokens: int) -> list[tuple[int, int]]:
    """Each sequence has a token at least, and all tokens are somebody's."""
    places = starts.tolist()
    assert places[0] == 0
    assert places[-1] == tokens
    assert all(start < stop for start, stop in pairwise(places))
    return list(pairwise(places))
