"""What happens to a new token's queries and keys before attention: RMS norm, rotary embedding, rounding to int8."""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

_WHOLE = tl.constexpr(1.5 * 2.0**23)  # added to a small float32, it leaves a whole number, halves rounded to even


@triton.jit
def pair_axis(pair: tl.tensor, SECTION: tl.constexpr, INTERLEAVED: tl.constexpr) -> tl.tensor:
    """Which of the three positions (temporal, height, width) turns a pair of channels, as MRotaryEmbedding says.

    Qwen2-VL's sections lie behind each other; Qwen3-VL's lie one by one in turn, what is left over being temporal.
    """
    if INTERLEAVED:
        height = (pair % 3 == 1) & (pair < 3 * SECTION[1])
        width = (pair % 3 == 2) & (pair < 3 * SECTION[2])
        axis = tl.where(height, 1, tl.where(width, 2, 0))
    else:
        axis = (pair >= SECTION[0]).to(tl.int32) + (pair >= SECTION[0] + SECTION[1]).to(tl.int32)
    return axis


@triton.jit
def turned(
    heads: tl.tensor,
    present: tl.tensor,
    norm: tl.tensor,
    rotary: tl.tuple,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    SECTION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EPSILON: tl.constexpr,
) -> tl.tensor:
    """One token's heads at pointers [R, 1], where present, normed (with EPSILON) and turned: [R, CHANNELS], rounded
    to their type after each.

    rotary: tables of cosine and sine [P, HEAD_DIM / 2], positions int32 [3, B] (for three axes), the token's row and
    the number of rows in them, and its place (for plain rotary embedding). Channels of a pair are half a head apart.
    Whatever a thread needs it reads itself, also what others read, so that nothing has to cross between threads.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    cosine, sine, positions, row, rows, place = rotary
    channel = tl.arange(0, CHANNELS)[None, :]
    other = tl.where(channel < HALF, channel + HALF, channel - HALF)
    inside = present & (channel < HEAD_DIM)
    stored = tl.load(heads + channel, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    y = tl.load(heads + other, mask=inside, other=0.0).to(tl.float32)
    if EPSILON is not None:
        weight = tl.load(norm + channel, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)
        other_weight = tl.load(norm + other, mask=channel < HEAD_DIM, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + EPSILON)[:, None]
        x = (x * scale * weight).to(stored.dtype).to(tl.float32)
        y = (y * scale * other_weight).to(stored.dtype).to(tl.float32)
    pair = tl.broadcast_to(channel % HALF, inside.shape)
    if len(SECTION) == 3:
        place = tl.load(positions + pair_axis(pair, SECTION, INTERLEAVED) * rows + row)
    entry = place.to(tl.int64) * HALF + pair
    cos = tl.load(cosine + entry, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sine + entry, mask=inside, other=0.0).to(tl.float32)
    return (x * cos + tl.where(channel < HALF, -sin, sin) * y).to(stored.dtype)


@triton.jit
def to_int8(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Whole numbers in float32 of x / scale, halves to even, cut off at int8's ends."""
    return tl.minimum(tl.maximum(x.to(tl.float32) / scale, -128.0), 127.0) + _WHOLE - _WHOLE
