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
def angles(
    cosine: tl.tensor,
    sine: tl.tensor,
    positions: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    HEAD_DIM: tl.constexpr,
    SECTION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> tl.tuple:
    """Cosine and signed sine of a token's channels where inside [R, CHANNELS], the same in each row; tables [P, D / 2].

    Plain, by the token's place; by three axes, of positions int32 [3, rows] those of its row. Each axis' angles are
    read whole and one of them is taken: a load of 16 bytes is faster than eight of 2.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    channel = tl.arange(0, inside.shape[1])[None, :]
    pair = tl.broadcast_to(channel % HALF, inside.shape)
    if len(SECTION) == 3:
        axis = pair_axis(pair, SECTION, INTERLEAVED)
        place = tl.load(positions + row)
    entry = place.to(tl.int64) * HALF + pair
    cos = tl.load(cosine + entry, mask=inside, other=0.0)
    sin = tl.load(sine + entry, mask=inside, other=0.0)
    if len(SECTION) == 3:
        for number in tl.static_range(1, 3):
            entry = tl.load(positions + number * rows + row).to(tl.int64) * HALF + pair
            cos = tl.where(axis == number, tl.load(cosine + entry, mask=inside, other=0.0), cos)
            sin = tl.where(axis == number, tl.load(sine + entry, mask=inside, other=0.0), sin)
    return cos.to(tl.float32), tl.where(channel < HALF, -sin.to(tl.float32), sin.to(tl.float32))


@triton.jit
def turned(
    heads: tl.tensor,
    inside: tl.tensor,
    norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    HEAD_DIM: tl.constexpr,
    EPSILON: tl.constexpr,
) -> tl.tensor:
    """One token's heads at pointers [R, 1], where inside [R, CHANNELS], normed (with EPSILON) and turned, rounded to
    their type after each.

    Channels of a pair are half a head apart. Whatever a thread needs it reads itself, also what others read, so that
    nothing has to cross between threads.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    channel = tl.arange(0, inside.shape[1])[None, :]
    other = tl.where(channel < HALF, channel + HALF, channel - HALF)
    stored = tl.load(heads + channel, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    y = tl.load(heads + other, mask=inside, other=0.0).to(tl.float32)
    if EPSILON is not None:
        weight = tl.load(norm + tl.broadcast_to(channel, inside.shape), mask=inside, other=0.0).to(tl.float32)
        other_weight = tl.load(norm + tl.broadcast_to(other, inside.shape), mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + EPSILON)[:, None]
        x = (x * scale * weight).to(stored.dtype).to(tl.float32)
        y = (y * scale * other_weight).to(stored.dtype).to(tl.float32)
    return (x * cos + y * sin).to(stored.dtype)


@triton.jit
def to_int8(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Whole numbers in float32 of x / scale, halves to even, cut off at int8's ends.

    The division is a multiplication: a quotient within a rounding error of a half may go to the other side.
    """
    return to_whole(tl.minimum(tl.maximum(x.to(tl.float32) * (1.0 / scale), -128.0), 127.0))


@triton.jit
def to_whole(x: tl.tensor) -> tl.tensor:
    """The nearest whole number of a small float32, halves to even."""
    return x + _WHOLE - _WHOLE
