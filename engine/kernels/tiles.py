"""How the products of the linear layers are cut into programs: the choice by default, and what a tuner can try.

The defaults follow measurements on an H100 (132 multiprocessors, 3.0 TB/s). For few rows what counts is to have some
2 MB of weights on their way from memory at any time; so narrow products, of few tiles, are split along their depth. For
many rows it is the tensor cores' rate; then a tile has as many tokens as outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from engine.kernels.overlap import BESIDE

Kernel = Literal["gemv", "int8", "float"]

GEMV_ROWS = 4  # up to here memory is the limit of a GEMV on an H100; engine/kernels/linear/gemv.py counts it out
FEW_ROWS = 128  # up to here all rows are in one tile, and every weight is read once
MOST_ROWS = 4096  # the largest bucket; more rows use its tiles
MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024  # of a program on sm_90
LEAST_SHARED_BYTES = 163 * 1024  # on sm_80; all defaults keep to it
MOST_SPLITS = 6
SPLITS_TRIED = (2, 3, 4, 5, 6, 8, 10)
MOST_ACCUMULATORS = 128  # registers of a thread, of 255
AHEAD_BYTES = 256  # of a thread, likewise in registers
LANE = 16  # weights that a thread loads at once
WARP = 32 * LANE
LONG = 256  # a step's depth where few rows leave room for it
BULK_DEPTH = 128  # bytes of a row that the copy engine spreads over the banks of shared memory
BULK_ALIGNED = 16  # bytes between two rows, for the copy engine


@dataclass(frozen=True)
class Product:
    """What a tile is chosen for: the kernel, its bucket of rows, the weight [n, k], whether gate and up are fused."""

    kernel: Kernel
    rows: int
    n: int
    k: int
    gate: bool

    @property
    def width(self) -> int:
        return self.n // 2 if self.gate else self.n


@dataclass(frozen=True)
class GemvTile:
    """A program computes `outputs` columns; its threads load `depth` weights of each at once, `unroll` times."""

    outputs: int
    depth: int
    unroll: int
    warps: int


@dataclass(frozen=True)
class GemmTile:
    """A program computes [outputs, tokens] by steps of `depth`, `stages` of them loading; `splits` share a depth. The
    weights of `ahead` steps are asked for before the rows are there. `bulk`: the copy engine brings both operands.
    """

    outputs: int
    tokens: int
    depth: int
    splits: int
    warps: int
    stages: int
    ahead: int = 0
    bulk: bool = False

    def tiles(self, rows: int, width: int) -> int:
        return _cdiv(rows, self.tokens) * _cdiv(width, self.outputs)


Tile = GemvTile | GemmTile


def rows_bucket(rows: int) -> int:
    """Row counts with one tile: 1, 2, 4, 8 and so on up to MOST_ROWS."""
    return min(1 << (rows - 1).bit_length(), MOST_ROWS)


class Tiles:
    """Tiles by product: measured ones where there are some, else the defaults. `bulk`: the chip has a copy engine."""

    def __init__(
        self, measured: Mapping[Product, Tile] | None = None, gemv_rows: int = GEMV_ROWS, *, bulk: bool = False
    ) -> None:
        self._measured = dict(measured or {})
        self.gemv_rows = gemv_rows
        self._bulk = bulk

    def gemv(self, rows: int, n: int, k: int, *, gate: bool) -> GemvTile:
        wanted = Product("gemv", rows_bucket(rows), n, k, gate)
        tile = self._measured.get(wanted)
        return tile if isinstance(tile, GemvTile) else default_gemv(wanted)

    def gemm(self, kernel: Literal["int8", "float"], rows: int, n: int, k: int, *, gate: bool) -> GemmTile:
        wanted = Product(kernel, rows_bucket(rows), n, k, gate)
        tile = self._measured.get(wanted)
        return tile if isinstance(tile, GemmTile) else default_gemm(wanted, bulk=self._bulk)


def default_gemv(wanted: Product) -> GemvTile:
    """One warp a program, which waits for no other, where a few steps of it cover the depth; else four a program.

    Each row takes as many registers as the weights it meets, so with more rows fewer weights are on their way at once:
    in wide products of many outputs, which share a row; in narrow ones, of few programs, further along the depth.
    """
    narrow = wanted.width < 32 * MULTIPROCESSORS
    lines, unroll = (4, 3) if wanted.rows <= 2 else (2, 3) if narrow else (8, 1)
    warps, depth = 1, min(WARP, _power_of_2(wanted.k, least=LANE))
    if wanted.k > 8 * WARP:
        lines, unroll, warps, depth = 4, 2, 4, 4 * WARP
    steps = _cdiv(wanted.k, depth)
    unroll = next((count for count in range(unroll, 1, -1) if steps % count == 0), min(unroll, steps))
    return GemvTile(lines // 2 if wanted.gate else lines, depth, unroll, warps)


def takes_bulk(wanted: Product) -> bool:
    """Whether the copy engine can bring its operands and is worth it: for many rows of int8, where threads that copy
    would take as long as the tensor cores.
    """
    return wanted.kernel == "int8" and wanted.rows > FEW_ROWS and wanted.k % BULK_ALIGNED == 0


def default_gemm(wanted: Product, *, bulk: bool = False) -> GemmTile:
    depth = 128 if wanted.kernel == "int8" else 64  # 16-bit rows take twice the shared memory
    if wanted.kernel == "int8" and wanted.rows <= FEW_ROWS and wanted.k % LONG == 0 and not wanted.gate:
        wide = wanted.width >= 256 * MULTIPROCESSORS
        if wide and wanted.rows <= BESIDE:
            return GemmTile(128, max(16, wanted.rows), LONG, 1, 8, 3)
        if not wide:
            return _default_of_narrow(wanted)
    if wanted.kernel == "int8" and wanted.rows <= BESIDE and wanted.k % LONG == 0 and wanted.k >= 8 * LONG:
        return GemmTile(64, max(16, wanted.rows), LONG, 1, 4, 4)  # of gate and up
    if wanted.rows <= FEW_ROWS:
        outputs = 128 if wanted.width >= 256 * MULTIPROCESSORS and not wanted.gate else 64
        tokens = max(16, wanted.rows)
        tile = GemmTile(outputs, tokens, 128, 1, _warps(outputs, tokens, wanted.gate), 4 if tokens <= 32 else 3)
        return _split(tile, wanted, 2 * MULTIPROCESSORS)
    bulk = bulk and takes_bulk(wanted)
    tile = GemmTile(128, 128, depth, 1, 8, 3, bulk=bulk)
    if tile.tiles(wanted.rows, wanted.width) < MULTIPROCESSORS or (wanted.gate and wanted.kernel == "float"):
        tile = GemmTile(64, 128, depth, 1, _warps(64, 128, wanted.gate), 3, bulk=bulk)
        return _split(tile, wanted, MULTIPROCESSORS)
    return tile


def _default_of_narrow(wanted: Product) -> GemmTile:
    """Long steps, and splits only where a program would have many: to add them up, more so of many tokens, takes longer
    than to leave some multiprocessors idle.
    """
    deep = _cdiv(wanted.k, 8 * LONG)  # splits of as many steps as are worth it
    tokens = min(max(16, wanted.rows), FEW_ROWS if deep > 1 else FEW_ROWS // 2)
    tile = GemmTile(64, tokens, LONG, 1, 4, 3 if tokens > 64 else 4)
    return _split(tile, wanted, min(MULTIPROCESSORS, deep * tile.tiles(wanted.rows, wanted.width)))


def _warps(outputs: int, tokens: int, gate: bool) -> int:
    """4, unless the sums are too many for their registers."""
    return 8 if outputs * tokens * (2 if gate else 1) > 64 * 128 else 4


def candidates(wanted: Product, shared_bytes: int = SHARED_BYTES, *, bulk: bool = False) -> Iterator[Tile]:
    """Tiles worth measuring for a product, the default first, none twice; all fit in so much shared memory.

    With `bulk` all those of a product that takes it.
    """
    default: Tile = default_gemv(wanted) if wanted.kernel == "gemv" else default_gemm(wanted, bulk=bulk)
    yield default
    if wanted.kernel == "gemv":
        options: list[Tile] = [*_gemv_candidates(wanted)]
    else:
        options = [*_gemm_candidates(wanted, shared_bytes, bulk=bulk and takes_bulk(wanted))]
    yield from (tile for tile in dict.fromkeys(options) if tile != default)


def _gemv_candidates(wanted: Product) -> Iterator[GemvTile]:
    for warps, outputs, unroll in product((1, 2, 4), (1, 2, 4, 8), (1, 2, 3, 4)):
        depth, lines = warps * WARP, outputs * (2 if wanted.gate else 1)
        in_registers = wanted.rows * lines * unroll <= (24 if wanted.rows == 1 else 32)
        if unroll <= _cdiv(wanted.k, depth) and depth < 2 * wanted.k and lines * unroll >= 4 and in_registers:
            yield GemvTile(outputs, depth, unroll, warps)


def _gemm_candidates(wanted: Product, shared_bytes: int, *, bulk: bool) -> Iterator[GemmTile]:
    parts, x_bytes = (2 if wanted.gate else 1), (1 if wanted.kernel == "int8" else 2)
    most = max(16, min(wanted.rows, 256))  # tokens of a tile; all of them where they are few, or half in short rows
    halved = BESIDE < most <= FEW_ROWS and wanted.k <= 8 * LONG
    least = min(most, FEW_ROWS) // (2 if halved else 1)
    few = wanted.kernel == "int8" and wanted.rows <= BESIDE
    all_outputs = (16, 32, 64, 128) if few and wanted.width < 32 * MULTIPROCESSORS else (64, 128)
    depths = [depth for depth in (64, 128, 256) if not bulk or depth <= BULK_DEPTH]
    for outputs, tokens, depth, stages in product(all_outputs, (16, 32, 64, 128, 256), depths, (3, 4)):
        shared = (outputs * parts + tokens * x_bytes) * depth * stages
        if shared > shared_bytes or not least <= tokens <= most or depth >= 2 * wanted.k:
            continue
        for warps in (4, 8):
            if outputs * tokens * parts <= MOST_ACCUMULATORS * warps * 32 and (warps == 4 or tokens >= 64):
                for tile in _split_candidates(GemmTile(outputs, tokens, depth, 1, warps, stages, bulk=bulk), wanted):
                    yield tile
                    if few and (ahead := _most_ahead(tile, wanted)):
                        yield replace(tile, ahead=ahead)


def _most_ahead(tile: GemmTile, wanted: Product) -> int:
    """All steps of a program, or as many as its registers can hold."""
    step = tile.outputs * tile.depth * (2 if wanted.gate else 1)
    steps = _cdiv(_cdiv(wanted.k, tile.depth), tile.splits)
    return min(steps, AHEAD_BYTES * 32 * tile.warps // step)


def _split_candidates(tile: GemmTile, wanted: Product) -> Iterator[GemmTile]:
    """None, and those of SPLITS_TRIED that give about one program to a multiprocessor, or two."""
    steps, tiles = _cdiv(wanted.k, tile.depth), tile.tiles(wanted.rows, wanted.width)
    yield tile
    for splits in SPLITS_TRIED:
        fills = MULTIPROCESSORS <= 2 * tiles * splits <= 4 * MULTIPROCESSORS
        if fills and splits < steps and _cdiv(steps, _cdiv(steps, splits)) == splits:
            yield replace(tile, splits=splits)


def _split(tile: GemmTile, wanted: Product, programs: int) -> GemmTile:
    """Share the depth so that there are about as many programs, each with two steps at least, all with as many."""
    steps = _cdiv(wanted.k, tile.depth)
    most = min(programs // tile.tiles(wanted.rows, wanted.width), MOST_SPLITS, steps // 2)
    splits = next((splits for splits in range(most, 1, -1) if steps % splits == 0), 1)
    return replace(tile, splits=splits)


def _cdiv(value: int, by: int) -> int:
    return -(-value // by)


def _power_of_2(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())
