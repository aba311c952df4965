"""Embedding of a step's tokens: int8 rows widened, and image features in the places of an image's tokens."""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.compiled import keyed
from engine.kernels.pointer import Tensor

_WARPS = 4


@keyed
@triton.jit
def embed_tokens(
    ids: tl.tensor,
    slot_tokens: tl.tensor,
    table: tl.tensor,
    scale: tl.tensor,
    feature_index: tl.tensor,
    features: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program t writes out [t, WIDTH]: features [feature_index[t]] if that is not negative, else the token's row.

    A token is ids[t], or if that is -1 - s what was last chosen for slot s. table int8 [V, WIDTH]; scale float32 [V].
    """
    token = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    feature = tl.load(feature_index + token).to(tl.int64)
    if feature >= 0:
        row = tl.load(features + feature * WIDTH + columns, mask=inside, other=0.0)
    else:
        chosen = tl.load(ids + token)
        if chosen < 0:
            chosen = tl.load(slot_tokens - 1 - chosen)
        place = chosen.to(tl.int64)
        widened = tl.load(table + place * WIDTH + columns, mask=inside, other=0).to(tl.float32)
        row = (widened * tl.load(scale + place)).to(out.dtype.element_ty)
    tl.store(out + token.to(tl.int64) * WIDTH + columns, row, mask=inside)


def token_embedding(
    ids: Tensor,
    slot_tokens: Tensor,
    table: Tensor,
    scale: Tensor,
    feature_index: Tensor,
    features: Tensor,
    out: Tensor,
) -> None:
    """Launch for ids [T] int32, feature_index [T] int32, features and out [.., hidden] of activations."""
    (tokens,), width = ids.shape, table.shape[1]
    embed_tokens[(tokens,)](
        ids, slot_tokens, table, scale, feature_index, features, out,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=_WARPS,
    )  # fmt: skip
