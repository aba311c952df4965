"""Which tile of each product is fastest, found in bounded time.

Measuring all is out of reach: qwen2-vl-2b with 32 sequences has 54 products with 2,434 candidates, and one costs 0.5 s
of a core to compile and some 20 ms to measure. So each product climbs: the default is measured, then tiles that
differ from the best so far in one number, splits aside, which follow from the others. What there is time for is shared
among products by their part in a step, each next candidate going to the largest share per candidate tried (the highest
averages of D'Hondt's apportionment).

Nothing here is random, and nothing but measured times decides: the same times give the same tiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.kernels.tiles import GemmTile, Product, Tile

REPEATS = 7  # of which the median counts
HOPELESS = 1.3  # times the best: such a first look is enough
GAIN = 1.02  # less than that is noise, and the default stays
MOST_TRIED = 12  # candidates of a product

Sample = Callable[[int], float]
"""Median seconds of a call in so many repetitions."""


@dataclass(frozen=True, slots=True)
class Task:
    """A product, its candidates with the default first, and its share of the time that matters, in any unit."""

    product: Product
    choices: tuple[Tile, ...]
    share: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A tile and the seconds of a call; None if there was no time to measure it, and it is the default."""

    tile: Tile
    seconds: float | None


class Bench(Protocol):
    def compile(self, jobs: Sequence[tuple[Product, Tile]]) -> None:
        """Make ready what `open` is going to be asked for."""

    def open(self, product: Product, tile: Tile) -> Sample | None:
        """How to time a candidate; None if it does not run or computes something else."""


class _Climb:
    """One product's search."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.asked = 0
        self.seconds: dict[Tile, float] = {}
        self._left = list(task.choices)

    def next_tile(self) -> Tile | None:
        """The nearest to the best so far; None if none is near, or enough were tried."""
        if not self.asked:
            return self._take(self.task.choices[0])
        best = self.best
        near = [tile for tile in self._left if distance(tile, best)[0] <= 1]
        if not near or self.asked >= MOST_TRIED:
            return None
        return self._take(min(near, key=lambda tile: distance(tile, best)))

    def _take(self, tile: Tile) -> Tile:
        self._left.remove(tile)
        self.asked += 1
        return tile

    @property
    def best(self) -> Tile:
        """The fastest, the first of equals; the default where none has run."""
        return min(self.seconds, key=lambda tile: (self.seconds[tile], self._rank(tile)), default=self.task.choices[0])

    def _rank(self, tile: Tile) -> int:
        return self.task.choices.index(tile)

    @property
    def choice(self) -> Choice:
        default, best = self.task.choices[0], self.best
        if default in self.seconds and self.seconds[default] <= GAIN * self.seconds[best]:
            best = default
        return Choice(best, self.seconds.get(best))


def distance(tile: Tile, other: Tile) -> tuple[int, bool]:
    """How many numbers differ, and whether splits do. A gemv's depth is that of its warps."""
    if isinstance(tile, GemmTile) and isinstance(other, GemmTile):
        return _differing(
            tile, other, "outputs", "tokens", "depth", "warps", "stages", "ahead"
        ), tile.splits != other.splits
    return _differing(tile, other, "outputs", "unroll", "warps"), False


def _differing(tile: Tile, other: Tile, *names: str) -> int:
    return sum(getattr(tile, name) != getattr(other, name) for name in names)


def search(
    tasks: Sequence[Task],
    bench: Bench,
    *,
    budget: float,
    batch: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Mapping[Product, Choice]:
    """A choice for each task after about `budget` seconds at most; candidates are compiled `batch` at a time.

    A batch does not begin that would end too late if it took as long as the longest before it. What was not reached
    keeps its default.
    """
    climbs, start, longest = [_Climb(task) for task in tasks], clock(), 0.0
    while (began := clock()) - start + longest <= budget and (jobs := _next_jobs(climbs, batch)):
        bench.compile([(climb.task.product, tile) for climb, tile in jobs])
        for climb, tile in jobs:
            _measure(climb, tile, bench)
        longest = max(longest, clock() - began)
    for climb in sorted(climbs, key=lambda climb: -climb.task.share):
        if clock() - start >= budget:
            break
        _measure_again(climb, bench)
    return {climb.task.product: climb.choice for climb in climbs}


def _next_jobs(climbs: Sequence[_Climb], most: int) -> list[tuple[_Climb, Tile]]:
    jobs: list[tuple[_Climb, Tile]] = []
    open_climbs = list(climbs)
    while open_climbs and len(jobs) < most:
        climb = max(open_climbs, key=lambda climb: (not climb.asked, climb.task.share / max(climb.asked, 1)))
        tile = climb.next_tile()
        if tile is None:
            open_climbs.remove(climb)
        else:
            jobs.append((climb, tile))
    return jobs


def _measure(climb: _Climb, tile: Tile, bench: Bench) -> None:
    sample = bench.open(climb.task.product, tile)
    if sample is None:
        return
    seconds = sample(1)
    if seconds <= HOPELESS * climb.seconds.get(climb.best, seconds):
        seconds = sample(REPEATS)
    climb.seconds[tile] = seconds


def _measure_again(climb: _Climb, bench: Bench) -> None:
    """The default and what beat it, one after the other: between their first times the clocks may have changed."""
    default, best = climb.task.choices[0], climb.best
    if best == default or default not in climb.seconds:
        return
    for tile in (default, best):
        if sample := bench.open(climb.task.product, tile):
            climb.seconds[tile] = sample(REPEATS)
