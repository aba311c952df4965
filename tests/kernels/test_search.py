"""The search for the fastest tile, on a device whose times are said and whose clock is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.kernels.search import GAIN, HOPELESS, MOST_TRIED, REPEATS, Choice, Sample, Task, distance, search
from engine.kernels.tiles import GemmTile, GemvTile, Product, Tile, candidates

NARROW = Product("int8", 32, 2048, 1536, False)
WIDE = Product("int8", 32, 17920, 1536, True)
FIRST = GemmTile(outputs=64, tokens=32, depth=128, splits=1, warps=4, stages=3)


def tile(**numbers: int) -> GemmTile:
    return GemmTile(**(FIRST.__dict__ | numbers))


@dataclass
class FakeBench:
    """Times by tile; None is one that does not run. What differs in rows alone is compiled once, but for a gemv."""

    times: Callable[[Product, Tile], float | None]
    compile_s: float = 0.0
    now: float = 0.0
    kernels: int = 0
    compiled: list[tuple[Product, Tile]] = field(default_factory=list)
    samples: list[tuple[Tile, int]] = field(default_factory=list)

    def compile(self, jobs: Sequence[tuple[Product, Tile]]) -> None:
        self.compiled += jobs
        kernels = {(p if p.kernel == "gemv" else replace(p, rows=0), tile) for p, tile in self.compiled}
        self.now += self.compile_s * (len(kernels) - self.kernels)
        self.kernels = len(kernels)

    def open(self, product: Product, tile: Tile) -> Sample | None:
        seconds = self.times(product, tile)
        if seconds is None:
            return None

        def sample(repeats: int) -> float:
            self.samples.append((tile, repeats))
            return seconds

        return sample

    def clock(self) -> float:
        return self.now


def by_tile(times: Mapping[Tile, float | None]) -> Callable[[Product, Tile], float | None]:
    return lambda _, tile: times.get(tile, 1.0)


def task(*choices: Tile, product: Product = NARROW, share: float = 1.0) -> Task:
    return Task(product, choices, share)


def run(bench: FakeBench, *tasks: Task, budget: float = 1e9, batch: int = 4) -> Mapping[Product, Choice]:
    return search(tasks, bench, budget=budget, batch=batch, clock=bench.clock)


def repeats_of(bench: FakeBench, wanted: Tile) -> list[int]:
    return [repeats for tile, repeats in bench.samples if tile == wanted]


def test_the_fastest_neighbour_is_chosen_with_its_time() -> None:
    bench = FakeBench(by_tile({FIRST: 3e-6, tile(depth=256): 2e-6, tile(warps=8): 2.5e-6}))
    choices = run(bench, task(FIRST, tile(warps=8), tile(depth=256), tile(stages=4)))
    assert choices == {NARROW: Choice(tile(depth=256), 2e-6)}


def test_a_better_tile_is_climbed_on_from() -> None:
    middle, top = tile(depth=256), tile(depth=256, warps=8)
    bench = FakeBench(by_tile({FIRST: 3e-6, middle: 2e-6, top: 1e-6}))
    assert run(bench, task(FIRST, top, middle))[NARROW].tile == top


def test_what_differs_in_two_numbers_from_the_best_is_not_tried() -> None:
    far = tile(depth=256, warps=8)
    bench = FakeBench(by_tile({far: 1e-9}))
    assert run(bench, task(FIRST, far))[NARROW] == Choice(FIRST, 1.0)
    assert bench.compiled == [(NARROW, FIRST)]


def test_splits_and_a_gemvs_depth_follow_from_the_other_numbers() -> None:
    assert distance(FIRST, tile(splits=3, depth=256)) == (1, True)
    assert distance(FIRST, tile(splits=3)) == (0, True)
    assert distance(GemvTile(4, 512, 2, 1), GemvTile(4, 1024, 2, 2)) == (1, False)
    assert distance(GemvTile(4, 512, 2, 1), GemvTile(2, 512, 3, 1)) == (2, False)


def test_the_nearest_come_first_and_of_those_the_first() -> None:
    choices = (FIRST, tile(depth=256, splits=2), tile(warps=8), tile(splits=2), tile(stages=4))
    bench = FakeBench(by_tile({}))
    run(bench, task(*choices), batch=1)
    assert [tile for _, tile in bench.compiled] == [FIRST, tile(splits=2), tile(warps=8), tile(stages=4), choices[1]]


def test_the_default_stays_where_nothing_is_clearly_faster() -> None:
    other = tile(depth=256)
    for seconds, expected in ((1.0, FIRST), (1.001 / GAIN, FIRST), (0.999 / GAIN, other)):
        bench = FakeBench(by_tile({FIRST: 1.0, other: seconds}))
        assert run(bench, task(FIRST, other))[NARROW].tile == expected


def test_of_equals_the_first_candidate_is_chosen() -> None:
    one, two = tile(depth=256), tile(warps=8)
    for choices in ((FIRST, one, two), (FIRST, two, one)):
        bench = FakeBench(by_tile({FIRST: 2.0, one: 1.0, two: 1.0}))
        assert run(bench, task(*choices))[NARROW].tile == choices[1]


def test_of_equals_the_first_candidate_is_chosen_even_if_it_is_measured_later() -> None:
    far, near = tile(depth=256, warps=8), tile(depth=256)
    bench = FakeBench(by_tile({FIRST: 2.0, far: 1.0, near: 1.0}))
    assert run(bench, task(FIRST, far, near))[NARROW].tile == far
    assert [tile for _, tile in bench.compiled] == [FIRST, near, far]


def test_a_hopeless_candidate_is_looked_at_once() -> None:
    slow, near = tile(depth=256), tile(warps=8)
    bench = FakeBench(by_tile({FIRST: 1.0, slow: HOPELESS + 0.01, near: HOPELESS - 0.01}))
    run(bench, task(FIRST, slow, near))
    assert repeats_of(bench, slow) == [1]
    assert repeats_of(bench, near) == [1, REPEATS]


def test_a_candidate_that_does_not_run_is_no_choice() -> None:
    broken = tile(depth=256)
    bench = FakeBench(by_tile({broken: None}))
    assert run(bench, task(FIRST, broken))[NARROW] == Choice(FIRST, 1.0)


def test_where_the_default_does_not_run_a_neighbour_is_chosen() -> None:
    bench = FakeBench(by_tile({FIRST: None}))
    assert run(bench, task(FIRST, tile(depth=256)))[NARROW] == Choice(tile(depth=256), 1.0)


def test_where_nothing_runs_the_default_is_left_unmeasured() -> None:
    bench = FakeBench(lambda _, tile: None)
    assert run(bench, task(FIRST, tile(depth=256)))[NARROW] == Choice(FIRST, None)


def test_the_default_and_what_beat_it_are_measured_again_next_to_each_other() -> None:
    """The default's first time was taken on a device that still slept."""
    other = tile(depth=256)
    times: dict[Tile, list[float]] = {FIRST: [2.0, 1.0], other: [1.0, 1.0]}
    bench = FakeBench(lambda _, tile: times[tile].pop(0))
    assert run(bench, task(FIRST, other))[NARROW] == Choice(FIRST, 1.0)


def test_no_product_takes_more_than_its_number_of_candidates() -> None:
    choices = tuple(candidates(Product("int8", 256, 1536, 8960, False)))
    assert len(choices) > 100
    steps = iter(range(10**6, 0, -1))
    bench = FakeBench(lambda _, tile: float(next(steps)))  # each is better than the one before
    run(bench, task(*choices))
    assert len(bench.compiled) == MOST_TRIED


def test_no_time_leaves_every_default() -> None:
    bench = FakeBench(by_tile({}), compile_s=1.0)
    assert run(bench, task(FIRST, tile(depth=256)), budget=-1.0) == {NARROW: Choice(FIRST, None)}
    assert not bench.compiled


def test_the_budget_is_kept_to_within_the_first_batch() -> None:
    choices = tuple(candidates(WIDE))
    for budget in (3.0, 5.5, 9.0):
        bench = FakeBench(by_tile({}), compile_s=0.5)
        run(bench, task(*choices, product=WIDE), task(*candidates(NARROW)), budget=budget, batch=4)
        assert budget - 2.0 < bench.now <= budget


def test_defaults_come_first_and_then_each_product_by_its_share() -> None:
    bench = FakeBench(by_tile({}), compile_s=1.0)
    deep = Product("int8", 32, 1536, 8960, False)
    tasks = task(*candidates(NARROW), share=1.0), task(*candidates(deep), product=deep, share=3.0)
    run(bench, *tasks, budget=12.0, batch=2)
    asked = [product for product, _ in bench.compiled]
    assert asked[:2] == [deep, NARROW]
    assert asked.count(deep) == 9
    assert asked.count(NARROW) == 3


def test_the_same_times_give_the_same_choices() -> None:
    def times(product: Product, tile: Tile) -> float:
        return 1 + hash((product.n, *tile.__dict__.values())) % 97 / 97

    def choose(batch: int) -> tuple[Mapping[Product, Choice], Iterable[tuple[Product, Tile]]]:
        bench = FakeBench(times, compile_s=0.5)
        tasks = task(*candidates(NARROW)), task(*candidates(WIDE), product=WIDE, share=2.0)
        return run(bench, *tasks, budget=8.0, batch=batch), bench.compiled

    assert choose(4) == choose(4)
