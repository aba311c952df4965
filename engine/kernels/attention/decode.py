"""One new token of each sequence attends over the paged cache: one launch for a layer.

Two numbers. A token costs 2 * head_dim * (2 or 1) bytes a key head, read once: with 2 heads of 128 in 16 bits 1 KB a
layer, so a sequence of 1,024 tokens 1 MB: 0.35 us at 3 TB/s alone, 11 us for 32 sequences, 45 us for 128. It costs
4 * head_dim operations a query head: 6 operations a byte for 12 query heads, 16 as tensor cores are fed (rows are
filled up to 16), of some 280 that an H100 has for each byte. So bytes are the limit for many sequences, and for a few
the chain of loads that wait for each other: the place in the table, keys, values, the splits of others.

Program (key head and tile of its query heads, split, sequence) reads its share of the cached tokens once for up to 16
query heads, the next tile of them on its way while one is multiplied; the first is asked for before queries are made
ready, which takes two loads that wait for each other. Splits take a sequence's tiles in turn, so they are equally long
whatever its length is, and a split knows its first tile before it knows that length: a captured grid serves them all.
A program that is not needed leaves at once. The program of the split that the new token is in takes its key and value
from where they were made: its state begins with them, and memory that one program writes is read by none of the same
launch.

Merge. Each split leaves its means in scratch memory and takes a ticket of its sequence and head; who takes the last
one reads all of them, in the order of splits, so that the result is the same whoever was last. A second kernel would
be as deterministic and costs its own start, 1 to 2 us in a captured graph, for every layer; the ticket costs one
atomic operation and the trip to L2 that the second kernel makes as well. The ticket's acquire and release order the
means of one program before the reads of another (CUDA's memory model: a barrier and an atomic operation of one thread
order what all threads of a block did), and the last program sets the ticket back for the next launch. Launches that
share tickets must follow one another, as those of one stream do.

Source: Flash-Decoding (Dao et al., 2023); online softmax (Milakov and Gimelshein, 2018).
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from engine.kernels.attention.heads import angles, to_int8, to_whole, turned
from engine.kernels.attention.merge import leave, merged, merged_channels, merged_rows
from engine.kernels.attention.parameters import ROWS as _ROWS
from engine.kernels.compiled import keyed
from engine.kernels.overlap import let_next_begin, wait_for_last

ROWS = tl.constexpr(_ROWS)
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
FINE = tl.constexpr(254.0)  # steps of what rounding a query to int8 leaves, in one of the first rounding's
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _read(
    cache: tl.tensor,
    block: tl.tensor,
    first: tl.tensor,
    held: tl.tensor,
    head: tl.tensor,
    TILE: tl.constexpr,
    PAGE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Words of cached tokens, int32 [TILE, CHANNELS / channels in a word], from place `first` on, which lie in one
    block; 0 from `held` on.

    A tile on its way while another is multiplied is words, because the compiler would give each 16-bit value a register
    of its own, and would wait for bytes at once to move them to where they are multiplied.
    """
    WORD: tl.constexpr = 32 // cache.dtype.element_ty.primitive_bitwidth
    WIDTH: tl.constexpr = HEAD_DIM // WORD
    token = tl.arange(0, TILE)[:, None]
    word = tl.arange(0, CHANNELS // WORD)[None, :]
    page = cache.to(tl.pointer_type(tl.int32), bitcast=True)
    page += block.to(tl.int64) * (PAGE * KV_HEADS * WIDTH) + head * WIDTH
    entry = (first % PAGE + token) * (KV_HEADS * WIDTH) + word
    return tl.load(page + entry, mask=(first + token < held) & (word < WIDTH), other=0)


@triton.jit
def _channels(words: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """What lies in words [R, C]: 16-bit floats [R, 2 * C], or int8 [R, 4 * C] as float16.

    With 0x64 before it, a byte b is 1024 + b in float16; 128 is added to a signed one by turning its first bit.
    """
    if TYPE.primitive_bitwidth == 8:
        if INTERPRETED:
            low = (words & 0xFF) | ((words & 0xFF00) << 8)
            high = ((words >> 16) & 0xFF) | ((words >> 8) & 0xFF0000)
            low, high = low ^ 0x64806480, high ^ 0x64806480
        else:  # three instructions, where the compiler makes seven of the same
            low, high = tl.inline_asm_elementwise(
                """{
                    .reg .b32 word;
                    xor.b32 word, $2, 0x80808080;
                    prmt.b32 $0, word, 0x64646464, 0x4140;
                    prmt.b32 $1, word, 0x64646464, 0x4342;
                }""",
                "=r,=r,r",
                [words],
                dtype=(tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        pairs = tl.join(low, high)  # channels (0, 1) and (2, 3)
        halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
        wide = tl.reshape(halves, (words.shape[0], 4 * words.shape[1])).to(tl.float16, bitcast=True) - 1152.0
    else:
        halves = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
        wide = tl.reshape(halves, (words.shape[0], 2 * words.shape[1])).to(TYPE, bitcast=True)
    return wide


@triton.jit
def _bytes(words: tl.tensor) -> tl.tensor:
    """What lies in words [R, C]: int8 [R, 4 * C]."""
    pairs = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    each = tl.join(pairs.to(tl.int8), (pairs >> 8).to(tl.int8))
    return tl.reshape(each, (words.shape[0], 4 * words.shape[1]))


@triton.jit
def _repeated(x: tl.tensor) -> tl.tensor:
    """x [R] or [R, C] over and over, ROWS rows in all; R is a power of 2."""
    times: tl.constexpr = ROWS // x.shape[0]
    if len(x.shape) == 1:
        all_rows = tl.reshape(tl.broadcast_to(x[None, :], (times, x.shape[0])), (ROWS,))
    else:
        all_rows = tl.reshape(tl.broadcast_to(x[None, :, :], (times, x.shape[0], x.shape[1])), (ROWS, x.shape[1]))
    return all_rows


@keyed
@triton.jit(do_not_specialize=["columns", "least"], do_not_specialize_on_alignment=["past", "block_table", "positions"])
def decode_attention(
    qkv: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    past: tl.tensor,
    block_table: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    positions: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    out: tl.tensor,
    scratch: tl.tensor,
    tickets: tl.tensor,
    columns: tl.tensor,
    least: tl.tensor,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SECTION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EPSILON: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
    SPLIT: tl.constexpr,
    KEPT: tl.constexpr,
    MERGED: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    EARLY: tl.constexpr = False,
) -> None:
    """Program (head tile, split, sequence); grid [KV_HEADS * tiles, splits, B], shapes as PagedDecodeAttention's.

    block_table has `columns` columns; a split has `least` tokens or more, no fewer than TILE, which divides PAGE. int8
    caches come with scales, others with None. DOT is the type that is multiplied. scratch and tickets int32 [B, head
    tiles] are used if SPLIT. CHANNELS is HEAD_DIM's next power of 2, WIDE the channels of a thread that merges.
    """
    CACHE: tl.constexpr = key_cache.dtype.element_ty
    TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    head_tile, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, first_row = head_tile // TILES, head_tile % TILES * ROWS
    start = split * TILE
    table = block_table + row.to(tl.int64) * columns
    block = tl.load(table + start // PAGE)
    held = tl.load(past + row)
    splits = tl.minimum(tl.num_programs(1), held // least + 1)
    if split >= splits:
        return
    keys = _read(key_cache, block, start, held, head, TILE, PAGE, KV_HEADS, HEAD_DIM, CHANNELS)
    values = _read(value_cache, block, start, held, head, TILE, PAGE, KV_HEADS, HEAD_DIM, CHANNELS)

    channel = tl.arange(0, CHANNELS)[None, :]
    each = tl.broadcast_to(channel, (KEPT, CHANNELS))  # read so, all that is computed lies where queries do
    count = tl.minimum(GROUP - first_row, ROWS)
    rows = tl.arange(0, KEPT)  # no more are made ready: with few heads to a key head that is most of a program
    inside = (rows[:, None] < count) & (channel < HEAD_DIM)
    cos, sin = angles(cosine, sine, positions, row, tl.num_programs(2), held, inside, HEAD_DIM, SECTION, INTERLEAVED)
    wait_for_last(EARLY)
    let_next_begin(EARLY)
    packed = qkv + row.to(tl.int64) * ((GROUP + 2) * KV_HEADS * HEAD_DIM)
    heads = packed + (head * GROUP + first_row + rows[:, None]) * HEAD_DIM
    query = turned(heads, inside, query_norm, cos, sin, HEAD_DIM, EPSILON)
    scale = tl.full([KEPT], LOG2_E / HEAD_DIM**0.5, tl.float32)
    if key_scale is not None:  # folded into queries, which then need a range of their own in 16 bits
        key_step = tl.load(key_scale + head * HEAD_DIM + each, mask=inside, other=1.0)
        wide = query.to(tl.float32) * key_step
        largest = tl.max(tl.abs(wide), 1)
        largest = tl.where(largest > 0.0, largest, 1.0)
        query = wide * (1.0 / largest)[:, None]
        scale *= largest
    WHOLE: tl.constexpr = CACHE.primitive_bitwidth == 8 and CHANNELS >= 32  # the depth of an int8 product, at least
    if WHOLE:
        query *= 127.0
        scale *= 1.0 / 127.0
        coarse = to_whole(query)
        fine = _repeated(to_whole((query - coarse) * FINE).to(tl.int8))
        coarse = _repeated(coarse.to(tl.int8))
    else:
        query = query.to(DOT)
        queries = _repeated(query)

    peak = tl.full([ROWS], -float("inf"), tl.float32)
    masses = tl.zeros([ROWS, TILE], tl.float32)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    if held // TILE % splits == split:  # the new token's place is in this split
        new = packed + (GROUP * KV_HEADS + head + rows[:, None] * 0) * HEAD_DIM
        key = turned(new, inside, key_norm, cos, sin, HEAD_DIM, EPSILON)
        value = tl.load(new + KV_HEADS * HEAD_DIM + channel, mask=inside, other=0.0)
        if key_scale is not None:
            key = to_int8(key, key_step)
            value = to_int8(value, tl.load(value_scale + head * HEAD_DIM + each, mask=inside, other=1.0))
        home = tl.load(table + held // PAGE).to(tl.int64) * PAGE + held % PAGE
        entry = (home * KV_HEADS + head) * HEAD_DIM + channel + rows[:, None] * 0
        once = inside & (first_row + rows[:, None] == 0)
        tl.store(key_cache + entry, key.to(CACHE), mask=once)
        tl.store(value_cache + entry, value.to(CACHE), mask=once)
        peak = _repeated(tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale)
        masses += tl.where(tl.arange(0, TILE) == 0, 1.0, 0.0)[None, :]
        total = _repeated(value.to(tl.float32))
    scale = _repeated(scale)

    first = start
    while first < held:
        if WHOLE:
            turned_keys = tl.trans(_bytes(keys))
            scores = tl.dot(fine, turned_keys, out_dtype=tl.int32).to(tl.float32) * (1.0 / FINE)
            scores += tl.dot(coarse, turned_keys, out_dtype=tl.int32).to(tl.float32)
        else:
            scores = tl.dot(queries, tl.trans(_channels(keys, CACHE).to(DOT)))
        scores *= scale[:, None]
        scores = tl.where((first + tl.arange(0, TILE) < held)[None, :], scores, -float("inf"))
        first += splits * TILE
        block = tl.load(table + first // PAGE, mask=first < held, other=0)
        keys = _read(key_cache, block, first, held, head, TILE, PAGE, KV_HEADS, HEAD_DIM, CHANNELS)
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        older = tl.exp2(peak - higher)[:, None]
        masses = masses * older + weights
        total = total * older + tl.dot(weights.to(DOT), _channels(values, CACHE).to(DOT))
        values = _read(value_cache, block, first, held, head, TILE, PAGE, KV_HEADS, HEAD_DIM, CHANNELS)
        peak = higher
    mass = tl.sum(masses, 1)

    target = out + row.to(tl.int64) * (GROUP * KV_HEADS * HEAD_DIM) + (head * GROUP + first_row) * HEAD_DIM
    if SPLIT and splits > 1:
        ticket = row * tl.num_programs(0) + head_tile
        units = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tl.num_programs(2)
        unit = ticket.to(tl.int64) * tl.num_programs(1)
        leave(scratch, units, unit + split, peak, mass, total, count, channel, KEPT, HEAD_DIM)
        tl.debug_barrier()
        taken = tl.atomic_add(tickets + ticket, 1, sem="acq_rel", scope="gpu")
        if taken == splits - 1:
            tl.store(tickets + ticket, 0)
            mean = merged(scratch, units, unit, splits, KEPT, HEAD_DIM, MERGED, CHANNELS, WIDE)
            of_row, of_channel = merged_rows(KEPT, CHANNELS, WIDE), merged_channels(KEPT, CHANNELS, WIDE)
            _write(target, mean, of_row, of_channel, value_scale, head, count, HEAD_DIM)
    else:
        each_row = tl.arange(0, ROWS)[:, None]
        _write(target, total / mass[:, None], each_row, channel, value_scale, head, count, HEAD_DIM)


@triton.jit
def _write(
    target: tl.tensor,
    mean: tl.tensor,
    row: tl.tensor,
    channel: tl.tensor,
    value_scale: tl.tensor,
    head: tl.tensor,
    count: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> None:
    """What of mean lies in the first `count` rows, to the heads from target on."""
    if value_scale is not None:
        mean *= tl.load(value_scale + head * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
    places = target + row * HEAD_DIM + channel
    tl.store(places, mean.to(target.dtype.element_ty), mask=(row < count) & (channel < HEAD_DIM))
