"""Reading a row of logits in a kernel: what its slot's record says of penalties and forbidden tokens is applied."""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from engine.sampling import record as layout
from engine.sampling.record import Word

SCALE = tl.constexpr(int(Word.SCALE))
LIMIT = tl.constexpr(int(Word.LIMIT))
TOP_P = tl.constexpr(int(Word.TOP_P))
REPETITION = tl.constexpr(int(Word.REPETITION))
FREQUENCY = tl.constexpr(int(Word.FREQUENCY))
PRESENCE = tl.constexpr(int(Word.PRESENCE))
TOP_K = tl.constexpr(int(Word.TOP_K))
FLAGS = tl.constexpr(int(Word.FLAGS))
SEED = tl.constexpr(int(Word.SEED))
STEP = tl.constexpr(int(Word.STEP))
FORBIDDEN = tl.constexpr(int(Word.FORBIDDEN))
FIRST_FORBIDDEN = tl.constexpr(layout.FIRST_FORBIDDEN)
DRAWN = tl.constexpr(layout.DRAWN)
PENALISED = tl.constexpr(layout.PENALISED)
MOST_SEEN = tl.constexpr(layout.MOST_SEEN)
INFINITE = tl.constexpr(0x7F800000)  # the key of a token of weight 0
CHUNK = tl.constexpr(4096)  # logits that a program of the first kernel takes
GROUP = tl.constexpr(16)  # neighbouring logits with one peak: a sector of 32 bytes in 16 bits


@triton.jit
def real(record: tl.tensor, word: tl.constexpr) -> tl.tensor:
    return tl.load(record + word).to(tl.float32, bitcast=True)


@triton.jit
def open_row(logits: tl.tensor, record: tl.tensor, counts: tl.tensor) -> tl.tensor:
    """What `read` needs of a row, loaded once."""
    penalised = (tl.load(record + FLAGS) & PENALISED) != 0
    penalties = (real(record, REPETITION), real(record, FREQUENCY), real(record, PRESENCE))
    return logits, record, counts, tl.load(record + FORBIDDEN), penalised, penalties


@triton.jit
def read(row: tl.tuple, columns: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """The row's logits at columns as `adjust` leaves them; -inf where not inside."""
    return adjust(row, tl.load(row[0] + columns, mask=inside, other=-float("inf")), columns, inside)


@triton.jit
def adjust(row: tl.tuple, x: tl.tensor, columns: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Logits x in float32 after penalties, -inf where forbidden, +inf for what is not a number."""
    _, record, counts, forbidden, penalised, penalties = row
    x = x.to(tl.float32)
    if penalised:
        repetition, frequency, presence = penalties
        seen = tl.load(counts + columns, mask=inside, other=0).to(tl.int32)
        times = (seen & MOST_SEEN).to(tl.float32)
        lower = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        lower = lower - frequency * times - tl.where(times > 0, presence, 0.0)
        x = tl.where(seen != 0, lower, x)
    while forbidden > 0:
        forbidden -= 1
        x = tl.where(columns == tl.load(record + FIRST_FORBIDDEN + forbidden), -float("inf"), x)
    return tl.where(x < float("inf"), x, float("inf"))


@triton.jit
def key(d: tl.tensor) -> tl.tensor:
    """Of d, which is not negative: its bits, ordered as d is."""
    return d.to(tl.int32, bitcast=True)
