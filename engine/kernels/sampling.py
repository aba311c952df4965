"""Sampling on a CUDA device: two launches for a whole batch, whatever the mix of parameters.

`scan_chunks` reads every logit once, on as many multiprocessors as there are chunks, and leaves per chunk the peak, its
place and the mass, per group of GROUP tokens the peak. `choose_tokens` gives one program to a row: a greedy row is done
with the peaks of the chunks; any other takes the SHORT groups with the highest peaks as its shortlist, finds the
top-k and top-p thresholds in it by bisection over the ordered bits of the values, and draws by inverse CDF in the order
of the vocabulary. Only a nucleus wider than the shortlist makes a program go over the row again
(engine/kernels/thresholds.py).

Values. d = (peak - logit) / temperature * log2(e) is never negative, so its bits as an integer, the *key*, are ordered
like d; a token's weight is 2 ** -d, and a filter keeps the keys up to a limit, ties included.

Bytes, for V = 151,936 in 16 bits: 0.30 MB a row in the first kernel (128 rows: 39 MB, 13 us at 3 TB/s), 40 KB of group
peaks and 16 KB of shortlist in the second. A wide nucleus reads its row from L2 three to six times more.

Sums are taken in an order that depends on the vocabulary alone: no row depends on its neighbours.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.compiled import keyed
from engine.kernels.rows import (
    CHUNK,
    DRAWN,
    FLAGS,
    GROUP,
    INFINITE,
    LIMIT,
    MOST_SEEN,
    PENALISED,
    SCALE,
    SEED,
    STEP,
    TOP_K,
    TOP_P,
    adjust,
    key,
    open_row,
    read,
    real,
)
from engine.kernels.thresholds import row_limit, smallest_limit

_COARSE = tl.constexpr(1024)  # keys; so near to the widest shortlist is near enough


@triton.constexpr_function
def span_of(vocab: int) -> int:
    """Chunks of a vocabulary, and of their groups `groups_of`, up to a power of 2."""
    return int(triton.next_power_of_2(triton.cdiv(vocab, CHUNK.value)))


@triton.constexpr_function
def groups_of(vocab: int) -> int:
    return int(triton.next_power_of_2(triton.cdiv(vocab, CHUNK.value) * (CHUNK.value // GROUP.value)))


@triton.constexpr_function
def work_of(vocab: int, short: int) -> int:
    """Words that a row works in: peak, place and mass of each chunk, peaks of the groups, the shortlist, d of a few."""
    return int(3 * span_of(vocab) + groups_of(vocab) + short + short * GROUP.value)


@keyed
@triton.jit(do_not_specialize=["words"], do_not_specialize_on_alignment=["slots"])
def scan_chunks(
    logits: tl.tensor,
    stride: tl.tensor,
    slots: tl.tensor,
    table: tl.tensor,
    counts: tl.tensor,
    work: tl.tensor,
    words: tl.tensor,
    VOCAB: tl.constexpr,
    SHORT: tl.constexpr,
) -> None:
    """Program (chunk, row) writes work[row]: chunk peaks [SPAN], their places, their masses, then the group peaks.

    logits [R, vocab] with rows `stride` apart; slots int32 [R]; table int32 [slots, words]; counts int16 [slots, vocab]
    (read for rows with penalties only); work float32 [R, work_of(vocab)]. Places are exact in float32 below 2 ** 24.
    Masses are relative to the peak of their chunk. Greedy rows get no masses and no group peaks.
    """
    SPAN: tl.constexpr = span_of(VOCAB)
    chunk, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits += index * stride
    x = tl.load(logits + columns, mask=columns < VOCAB, other=-float("inf"))  # on its way while the record is read
    slot = tl.load(slots + index).to(tl.int64)
    record = table + slot * words
    x = adjust(open_row(logits, record, counts + slot * VOCAB), x, columns, columns < VOCAB)
    peaks = tl.max(x, 1)
    peak = tl.max(peaks, 0)
    place = tl.min(tl.min(tl.where(x == peak, columns, VOCAB), 1), 0)
    out = work + index * work_of(VOCAB, SHORT)
    tl.store(out + chunk, peak)
    tl.store(out + SPAN + chunk, place.to(tl.float32))
    if (tl.load(record + FLAGS) & DRAWN) != 0:
        tl.store(out + 3 * SPAN + group, peaks)
        weights = tl.where(x > -float("inf"), tl.exp2((x - peak) * real(record, SCALE)), 0.0)
        tl.store(out + 2 * SPAN + chunk, tl.sum(tl.sum(weights, 1), 0))


@triton.jit
def _locate(weights: tl.tensor, number: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """The place in weights [SIZE], not all 0, in which a number of [0, 1] falls.

    The running sums of a parallel scan may fall by a rounding error, so a place without weight is ruled out by name.
    """
    places = tl.arange(0, SIZE)
    sums = tl.cumsum(weights, 0)
    goal = (number * tl.max(sums, 0).to(tl.float64)).to(tl.float32)
    first = tl.min(tl.where((weights > 0) & (sums > goal), places, SIZE), 0)
    last = tl.max(tl.where(weights > 0, places, 0), 0)
    return tl.minimum(first, last)


@triton.jit
def _shortlist(
    out: tl.tensor, ids: tl.tensor, peak: tl.tensor, scale: tl.tensor, VOCAB: tl.constexpr, SHORT: tl.constexpr
) -> tl.tensor:
    """Write the ids of the groups with the likeliest tokens, ascending; (how many, the key up to which all are in).

    out: the peaks of the groups. At most SHORT groups are taken: those that have a key up to the floor.
    """
    group = tl.arange(0, groups_of(VOCAB))
    peaks = tl.load(out + group, mask=group * GROUP < VOCAB, other=-float("inf"))
    keys = key((peak - peaks) * scale)
    low, high = tl.full([], -1, tl.int32), tl.full([], INFINITE, tl.int32)
    if VOCAB <= SHORT * GROUP:
        low = high
    while high - low > _COARSE:
        middle = low + (high - low) // 2
        if tl.sum((keys <= middle).to(tl.int32), 0) <= SHORT:
            low = middle
        else:
            high = middle
    taken = (keys <= low) & (group * GROUP < VOCAB)
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(ids + place, group.to(tl.float32), mask=taken)
    tl.debug_barrier()
    return tl.sum(taken.to(tl.int32), 0), low


@triton.jit
def _chunk_masses(row: tl.tuple, peak: tl.tensor, scale: tl.tensor, limit: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """The mass that each chunk has up to limit: [SPAN]."""
    SPAN: tl.constexpr = span_of(VOCAB)
    masses = tl.zeros([SPAN], tl.float32)
    for chunk in range(triton.cdiv(VOCAB, CHUNK)):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        d = (peak - read(row, columns, columns < VOCAB)) * scale
        mass = tl.sum(tl.where(key(d) <= limit, tl.exp2(-d), 0.0), 0)
        masses = tl.where(tl.arange(0, SPAN) == chunk, mass, masses)
    return masses


@triton.jit
def _uniform(record: tl.tensor) -> tl.tensor:
    """The number of [0, 1) for the slot's seed and step, bit for bit that of engine/sampling/philox.py; float64."""
    low = tl.load(record + SEED).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(record + SEED + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    step = tl.load(record + STEP)
    first, second, _, _ = tl.philox((high << 32) | low, step, step * 0, step * 0, step * 0)
    bits = (first.to(tl.uint64) << 21) ^ (second >> 11).to(tl.uint64)
    return bits.to(tl.float64) * (2.0**-53)


@triton.jit
def _draw(
    row: tl.tuple,
    record: tl.tensor,
    out: tl.tensor,
    peak: tl.tensor,
    masses: tl.tensor,
    VOCAB: tl.constexpr,
    SHORT: tl.constexpr,
) -> tl.tensor:
    """A token of the row by its temperature and filters. masses: those of the chunks [SPAN], all filters aside."""
    SPAN: tl.constexpr = span_of(VOCAB)
    scale, top_p, top_k = real(record, SCALE), real(record, TOP_P), tl.load(record + TOP_K)
    number = _uniform(record)
    limit = tl.load(record + LIMIT)
    token = top_k * 0 - 1
    if (limit < INFINITE) | (top_k > 0) | (top_p < 1.0):
        ids = out + 3 * SPAN + groups_of(VOCAB)
        taken, floor = _shortlist(out + 3 * SPAN, ids, peak, scale, VOCAB, SHORT)
        place = tl.arange(0, SHORT * GROUP)
        listed = place // GROUP < taken
        columns = tl.load(ids + place // GROUP, mask=listed, other=0.0).to(tl.int32) * GROUP + place % GROUP
        listed = listed & (columns < VOCAB)
        d = (peak - read(row, columns, listed)) * scale
        keys = key(d)
        weights = tl.where(listed, tl.exp2(-d), 0.0)
        closed = limit <= floor  # all that is kept is in the shortlist
        for stage in range(2):  # top-k, which counts, then top-p, which weighs what is left
            if tl.where(stage == 0, top_k > 0, top_p < 1.0):
                goal = top_k.to(tl.float32)
                total = goal * 0.0 + VOCAB
                if stage == 1:
                    if closed:
                        total = tl.sum(tl.where(keys <= limit, weights, 0.0), 0)
                    else:
                        if limit < INFINITE:
                            masses = _chunk_masses(row, peak, scale, limit, VOCAB)
                        total = tl.sum(masses, 0)
                    goal = top_p * total
                worth = tl.where(stage == 0, tl.where(listed, 1.0, 0.0), weights)
                head = tl.sum(tl.where(keys <= tl.minimum(limit, floor), worth, 0.0), 0)
                if closed | (head >= goal):
                    limit = smallest_limit(keys, worth, goal, token, tl.minimum(limit, floor))
                    closed = limit <= floor
                else:
                    high = limit
                    if stage == 1:  # tokens of 2 ** -edge and less weigh at most (1 - top_p) * total together
                        edge = tl.log2(total + VOCAB) - tl.log2((1.0 - top_p) * total)
                        high = tl.maximum(tl.minimum(limit, key(edge)), floor + 1)
                    few = ids + SHORT
                    limit = row_limit(
                        row, few, peak, scale, goal, stage == 0, floor, head, high, total, VOCAB, SHORT * GROUP
                    )
        if closed:
            chosen = _locate(tl.where(keys <= limit, weights, 0.0), number, SHORT * GROUP)
            token = tl.load(ids + chosen // GROUP).to(tl.int32) * GROUP + chosen % GROUP
        elif limit < INFINITE:
            masses = _chunk_masses(row, peak, scale, limit, VOCAB)
    if token < 0:
        token = _draw_from_chunks(row, peak, scale, limit, masses, number, VOCAB)
    return token


@triton.jit
def _draw_from_chunks(
    row: tl.tuple,
    peak: tl.tensor,
    scale: tl.tensor,
    limit: tl.tensor,
    masses: tl.tensor,
    number: tl.tensor,
    VOCAB: tl.constexpr,
) -> tl.tensor:
    """The chunk by the masses [SPAN] of what is kept, then the token in the chunk."""
    chunk = _locate(masses, number, span_of(VOCAB))
    sums = tl.cumsum(masses, 0)
    here = tl.arange(0, span_of(VOCAB)) == chunk
    mass = tl.sum(tl.where(here, masses, 0.0), 0).to(tl.float64)
    before = tl.sum(tl.where(here, sums - masses, 0.0), 0).to(tl.float64)
    left = (number * tl.max(sums, 0).to(tl.float64) - before) / mass
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    d = (peak - read(row, columns, columns < VOCAB)) * scale
    weights = tl.where(key(d) <= limit, tl.exp2(-d), 0.0)
    return chunk * CHUNK + _locate(weights, tl.minimum(tl.maximum(left, 0.0), 1.0), CHUNK)


@keyed
@triton.jit(do_not_specialize=["words"], do_not_specialize_on_alignment=["slots"])
def choose_tokens(
    logits: tl.tensor,
    stride: tl.tensor,
    slots: tl.tensor,
    table: tl.tensor,
    counts: tl.tensor,
    work: tl.tensor,
    tokens: tl.tensor,
    results: tl.tensor,
    words: tl.tensor,
    VOCAB: tl.constexpr,
    SHORT: tl.constexpr,
) -> None:
    """Program (row) ends what `scan_chunks` began: writes tokens[slot] and results[row], int32, and moves the slot on.

    A row without a finite peak gives -1 and its slot stays as it is.
    """
    SPAN: tl.constexpr = span_of(VOCAB)
    index = tl.program_id(0).to(tl.int64)
    out = work + index * work_of(VOCAB, SHORT)
    chunk = tl.arange(0, SPAN)
    peaks = tl.load(out + chunk, mask=chunk * CHUNK < VOCAB, other=-float("inf"))
    places = tl.load(out + SPAN + chunk, mask=chunk * CHUNK < VOCAB, other=0.0).to(tl.int32)
    slot = tl.load(slots + index).to(tl.int64)
    record = table + slot * words
    flags = tl.load(record + FLAGS)
    peak = tl.max(peaks, 0)
    token = tl.min(tl.where(peaks == peak, places, VOCAB), 0)
    if (peak > -float("inf")) & (peak < float("inf")):
        if (flags & DRAWN) != 0:
            masses = tl.load(out + 2 * SPAN + chunk, mask=chunk * CHUNK < VOCAB, other=0.0)
            masses *= tl.exp2((peaks - peak) * real(record, SCALE))
            row = open_row(logits + index * stride, record, counts + slot * VOCAB)
            token = _draw(row, record, out, peak, masses, VOCAB, SHORT)
        tl.store(record + STEP, tl.load(record + STEP) + 1)
        if (flags & PENALISED) != 0:
            seen = tl.load(counts + slot * VOCAB + token)
            tl.store(counts + slot * VOCAB + token, seen + ((seen & MOST_SEEN) < MOST_SEEN).to(tl.int16))
    else:
        token = -1
    tl.store(tokens + slot, token)
    tl.store(results + index, token)
