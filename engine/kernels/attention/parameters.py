"""Sizes of decode attention: what a model says, how a kernel is cut, how a context is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.kernels.workspace import TICKETS

ROWS = 16  # query heads of a program: the least that tensor cores multiply at once
MOST_SPLITS = 64  # a merge reads all of a sequence's splits, on one multiprocessor
_FEW_ROWS = 2  # query heads of a program
_LONGEST_SPLIT = 2048  # tokens; among short sequences a long one would hold up the step


def power_of_2(number: int) -> int:
    """The next one up."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, slots=True)
class AttentionParameters:
    """One layer's attention. Rotary embedding is plain, by a token's place, or three-axis if `mrope_section` (pairs
    of channels per axis: temporal, height, width) is not empty; `qk_norm_epsilon` is None without a norm of heads.

    Raises ValueError for sizes that no kernel here computes.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mrope_section: Sequence[int] = ()
    mrope_interleaved: bool = False
    qk_norm_epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key heads evenly")
        if self.head_dim % 16 or not 16 <= self.head_dim <= 256:
            raise ValueError(f"heads of {self.head_dim} channels; a multiple of 16 up to 256 is supported")
        if self.mrope_section and (len(self.mrope_section) != 3 or sum(self.mrope_section) != self.head_dim // 2):
            raise ValueError(f"mrope_section {self.mrope_section} has not three axes of {self.head_dim // 2} pairs")

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def head_tiles(self) -> int:
        """Programs that share a key head, each with up to ROWS of its query heads."""
        return -(-self.group // ROWS)

    @property
    def width(self) -> int:
        """Of queries, keys and values side by side."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def kept_rows(self) -> int:
        """Rows of ROWS that a split leaves for the merge, a power of 2."""
        return power_of_2(min(self.group, ROWS))


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """How the kernel is cut: `tokens` are read at once (a power of 2) by `warps` warps of at most `registers` a thread;
    a split has `least` tokens or more, which are no fewer, and there are about `programs` of them to a multiprocessor;
    `merged` splits (a power of 2) are read at once in the end.
    """

    tokens: int
    warps: int = 4
    registers: int | None = None
    least: int = 64
    programs: int = 4
    merged: int = 8


def default_tile(parameters: AttentionParameters, batch: int, multiprocessors: int, *, int8: bool) -> AttentionTile:
    """Measured on an H100 for heads of 128 channels, 6 and 2 query heads to a key head, 1,000 tokens, 1 to 128
    sequences, between the products of a layer, by how many programs there are without splits. The fewer of them, the
    more a launch waits for a chain of loads and for the merge of its splits, and the more warps and the fewer splits it
    has; with many, splits cost more than they fill.

    int8 caches take the same, but for many sequences: a token's bytes are half as many, and instructions widen them. So
    twice as many warps share them, or where few query heads leave a program little else to do, many small programs.
    """
    width = power_of_2(parameters.head_dim)
    kept = parameters.kept_rows * width
    if width > 128:
        return AttentionTile(tokens=32, merged=_merged(8192, kept))
    units = batch * parameters.kv_heads * parameters.head_tiles
    if 16 * units <= multiprocessors:
        return AttentionTile(tokens=64, least=128, programs=1, merged=_merged(16384, kept))
    if 5 * units <= multiprocessors:
        return AttentionTile(tokens=64, warps=8, least=128, programs=1, merged=_merged(8192, kept))
    if 4 * units <= 3 * multiprocessors:
        if int8:
            return AttentionTile(tokens=16, warps=1, programs=12, merged=_merged(4096, kept))
        return AttentionTile(tokens=32, warps=2, programs=4, merged=_merged(8192, kept))
    if int8 and width >= 64:
        if units <= multiprocessors:
            return AttentionTile(tokens=128, warps=8, least=128, programs=1, merged=_merged(8192, kept))
        if parameters.kept_rows <= _FEW_ROWS:
            return AttentionTile(tokens=16, warps=2, programs=8, merged=_merged(2048, kept))
        return AttentionTile(tokens=64, warps=8, least=128, programs=3, merged=_merged(8192, kept))
    if 2 * units <= 3 * multiprocessors:
        return AttentionTile(tokens=32, warps=2, programs=6, merged=_merged(8192, kept))
    if parameters.kept_rows <= _FEW_ROWS:
        return AttentionTile(tokens=32, warps=2, programs=4, merged=_merged(2048, kept))
    return AttentionTile(tokens=64, least=128, programs=3, merged=_merged(16384, kept))


def _merged(values: int, kept: int) -> int:
    """How many splits of `kept` values each are read at once."""
    return min(32, max(1, values // kept))


def splits_of(
    parameters: AttentionParameters, tile: AttentionTile, batch: int, context: int, multiprocessors: int
) -> int:
    """Programs that share a sequence, for a grid that is the same whatever the lengths of `batch` sequences, of which
    the longest may come to `context` tokens.

    Enough programs to fill the device, none with too many tokens, and never more than a merge can bear. It depends on
    nothing that changes inside a captured graph.
    """
    sequences = batch * parameters.kv_heads * parameters.head_tiles
    if sequences > TICKETS:  # enough to do without splits
        return 1
    wanted = max(tile.programs * multiprocessors // sequences, -(-context // _LONGEST_SPLIT))
    return max(1, min(wanted, MOST_SPLITS, -(-context // tile.least)))
