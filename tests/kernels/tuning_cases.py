"""Timing linear layers with the kernels interpreted, on a CPU's clock; run by test_tuning.py.

Triton must interpret the kernels, which is decided when triton is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from engine.kernels import linear_bench
from engine.kernels.linear import Int8Linear, LinearParameters
from engine.kernels.linear_bench import LEAST_CALLS, Layer, LinearBench, Setting
from engine.kernels.search import Sample
from engine.kernels.tiles import GemmTile, GemvTile, Product, Tile, Tiles

CPU = torch.device("cpu")
PLAIN = Layer(16, 32, LinearParameters(), bias=True, residual=True)
GATED = Layer(32, 32, LinearParameters(1e-6, "rms", "silu_gate"), bias=False, residual=False)
GEMV = Product("gemv", 2, 16, 32, False)
GEMM = Product("int8", 16, 16, 32, False)
FLOAT = Product("float", 16, 32, 32, True)
GEMM_GATED = Product("int8", 16, 32, 32, True)
SETTINGS = {
    GEMV: Setting(PLAIN, 2), GEMM: Setting(PLAIN, 13), GEMM_GATED: Setting(GATED, 16), FLOAT: Setting(GATED, 9)
}  # fmt: skip
FEW = [GemvTile(8, 32, 1, 1), GemvTile(4, 32, 1, 1)]
MANY = [GemmTile(16, 16, 16, splits, 4, 3) for splits in (1, 2)]
TILES: dict[Product, list[Tile]] = {GEMV: [*FEW], GEMM: [*MANY], GEMM_GATED: [*MANY], FLOAT: [MANY[0]]}


def timed(calls: Sequence[Callable[[], None]]) -> Sample:
    """The last call alone: interpreted, each takes a second."""
    start = time.perf_counter()
    calls[-1]()
    seconds = time.perf_counter() - start
    return lambda repeats: seconds


@pytest.fixture
def bench() -> Iterator[LinearBench]:
    with LinearBench(SETTINGS, CPU, torch.float16, threads=1, rotated=1, measure=timed) as bench:
        yield bench


@pytest.mark.parametrize("product", [GEMV, GEMM_GATED, FLOAT], ids=str)
def test_every_tile_of_a_product_is_timed(bench: LinearBench, product: Product) -> None:
    bench.compile([(product, tile) for tile in TILES[product]])
    for tile in TILES[product]:
        sample = bench.open(product, tile)
        assert sample is not None
        assert sample(1) > 0


class Altered(Int8Linear):
    """A layer that misbehaves in the second tile."""

    bad: Callable[[torch.Tensor], None]

    def __init__(self, parameters: LinearParameters, workspace: object, tiles: Tiles) -> None:
        super().__init__(parameters, workspace, tiles)  # type: ignore[arg-type]
        self.tiles = tiles

    def __call__(self, *call: object) -> None:
        super().__call__(*call)  # type: ignore[arg-type]
        y = call[-1]
        assert isinstance(y, torch.Tensor)
        if TILES[GEMM][1] == self.tiles.gemm("int8", y.shape[0], 16, 32, gate=False):
            Altered.bad(y)


def opened(bench: LinearBench) -> list[bool]:
    bench.compile([(GEMM, tile) for tile in TILES[GEMM]])
    return [bench.open(GEMM, tile) is not None for tile in TILES[GEMM]]


@pytest.mark.parametrize(
    "bad",
    [lambda y: y[-1, -1].add_(10), lambda y: y[-1].fill_(torch.nan), lambda y: y[:, 3].zero_()],
    ids=["off", "nan", "zeros"],
)
def test_a_tile_that_computes_something_else_is_refused(
    bench: LinearBench, monkeypatch: pytest.MonkeyPatch, bad: Callable[[torch.Tensor], None]
) -> None:
    monkeypatch.setattr(linear_bench, "Int8Linear", Altered)
    monkeypatch.setattr(Altered, "bad", staticmethod(bad), raising=False)
    assert opened(bench) == [True, False]


def test_what_leaves_part_of_the_result_unwritten_is_refused(
    bench: LinearBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory holds the right numbers of the tile before."""
    before: list[torch.Tensor] = []

    class Partial(Int8Linear):
        def __call__(self, *call: object) -> None:
            y = call[-1]
            assert isinstance(y, torch.Tensor)
            before[:] = [y[0].clone()]
            super().__call__(*call)  # type: ignore[arg-type]
            y[0] = before[0]

    assert opened(bench) == [True, True]
    monkeypatch.setattr(linear_bench, "Int8Linear", Partial)
    assert bench.open(GEMM, TILES[GEMM][1]) is None


def raising(error: Exception) -> Callable[[torch.Tensor], None]:
    def bad(y: torch.Tensor) -> None:
        raise error

    return bad


def test_a_tile_that_does_not_compile_is_refused(bench: LinearBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_bench, "Int8Linear", Altered)
    monkeypatch.setattr(Altered, "bad", staticmethod(raising(RuntimeError("PassManager::run failed"))), raising=False)
    assert opened(bench) == [True, False]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_ends_the_device_ends_the_tuning(
    bench: LinearBench, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    monkeypatch.setattr(linear_bench, "Int8Linear", Altered)
    monkeypatch.setattr(Altered, "bad", staticmethod(raising(error("illegal memory access"))), raising=False)
    with pytest.raises(error):
        opened(bench)


def test_each_call_of_a_graph_has_a_weight_that_was_not_read_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[int] = []

    class Watched(Int8Linear):
        def __call__(self, *call: object) -> None:
            weight = call[1]
            assert isinstance(weight, torch.Tensor)
            places.append(weight.data_ptr())

    def collect(calls: Sequence[Callable[[], None]]) -> Sample:
        places.clear()
        for call in calls:
            call()
        return lambda repeats: 1.0

    monkeypatch.setattr(linear_bench, "Int8Linear", Watched)
    monkeypatch.setattr(LinearBench, "_agrees", lambda *_: True)
    for rotated, copies in ((8 * 512, 8), (1, 2)):  # at least the largest weight is there, which is two of these
        with LinearBench(SETTINGS, CPU, torch.float16, threads=1, rotated=rotated, measure=collect) as bench:
            assert bench.open(GEMM, TILES[GEMM][0]) is not None
        assert len(set(places)) == copies
        assert len(places) == max(copies, LEAST_CALLS)
        assert all(place % 16 == 0 for place in places)


def test_threads_are_entered_before_they_compile() -> None:
    entered: list[int] = []
    with LinearBench(
        SETTINGS, CPU, torch.float16, threads=1, rotated=1, enter_thread=lambda: entered.append(1), measure=timed
    ) as bench:
        bench.compile([(GEMV, FEW[0])])
    assert entered == [1]
