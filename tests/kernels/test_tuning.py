"""Tuning a decoder's kernels: what is measured, what is taken, and that the next start measures nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.kernels.search import Choice
from engine.kernels.tile_store import Chip, TileStore
from engine.kernels.tiles import GEMV_ROWS, SHARED_BYTES, Product, Tile, candidates, rows_bucket
from engine.runtime.cuda.buckets import Buckets
from engine.spec import DecoderSpec, RopeSpec
from tests.kernels.test_search import FakeBench
from tests.kernels.triton_tests import run_cases

pytest.importorskip("triton")
from engine.kernels import tuning
from engine.kernels.linear import LinearParameters
from engine.kernels.linear_bench import Layer, Setting
from engine.kernels.tuning import BUDGET_S, Part, Plan, gemv_rows, kept_or_measured, measured, plan_for

CASES = Path(__file__).with_name("tuning_cases.py")
CHIP = Chip("H100", 132, SHARED_BYTES, False, "2.11", "3.6", "0123")
QWEN2_VL_2B = DecoderSpec(
    layers=28, hidden=1536, heads=12, kv_heads=2, head_dim=128, intermediate=8960, vocab=151936, norm_eps=1e-6,
    rope=RopeSpec((1.0,) * 64), context_length=32768, qkv_bias=True, attention_out_bias=False, mlp_bias=False,
    tied_head=True,
)  # fmt: skip
SQUARE = replace(QWEN2_VL_2B, heads=12, kv_heads=12, hidden=1536, vocab=1536)  # the head is as large as the output


def plan(slots: int = 32, spec: DecoderSpec = QWEN2_VL_2B, step_tokens: int | None = None) -> Plan:
    rows = {bucket.batch for bucket in Buckets(slots, 4096)}
    return plan_for(spec, rows, 1024 + slots if step_tokens is None else step_tokens)


def test_tiles_are_timed_and_checked_interpreted() -> None:
    run_cases(CASES, interpreted=True)


@pytest.mark.parametrize(("slots", "products", "compared"), [(1, 61, 12), (8, 67, 14), (32, 69, 15), (128, 71, 15)])
def test_what_is_measured_for_a_decoder(slots: int, products: int, compared: int) -> None:
    made = plan(slots)
    assert sum(product.kernel != "float" for product in made.settings) == products
    assert len(made.compared) == compared
    for product, setting in made.settings.items():
        assert rows_bucket(setting.rows) == product.rows, "the tile that such a call takes"
        assert (setting.layer.n, setting.layer.k) == (product.n, product.k)
        assert setting.layer.n != QWEN2_VL_2B.vocab or setting.rows <= slots, "the head sees rows that choose a token"
        assert setting.rows <= 1024 + slots
    for rows in range(1, 1024 + slots + 1):
        for part in (part for part in made.parts if not part.head or rows <= slots):
            kernels = ["gemv"] * (rows <= GEMV_ROWS) + ["int8", "float"] * (rows > 1)
            for kernel in kernels:
                assert part.product(kernel, rows_bucket(rows)) in made.settings, "no request waits for a compiler"  # type: ignore[arg-type]


def test_the_layers_are_those_of_the_graph() -> None:
    by_width = {part.layer.n: part for part in plan().parts}
    assert {n: part.count for n, part in by_width.items()} == {2048: 28, 17920: 28, 1536: 28, 151936: 1}
    qkv, gate_up, head = (by_width[n].layer for n in (2048, 17920, 151936))
    assert (qkv.parameters.norm, qkv.bias, qkv.residual) == ("rms", True, False)
    assert (gate_up.parameters.activation, gate_up.bias, gate_up.residual) == ("silu_gate", False, False)
    assert (head.parameters.norm, head.bias, head.residual) == ("rms", False, False)
    down = next(part.layer for part in plan().parts if part.layer.k == 8960)
    assert (down.parameters.norm, down.bias, down.residual) == ("none", False, True)


def test_layers_of_one_shape_are_one_product_of_their_common_share() -> None:
    made = plan(spec=SQUARE)
    out = next(product for product in made.settings if product.n == 1536 and product.k == 1536 and product.rows == 16)
    alone = plan(spec=replace(SQUARE, vocab=1 << 16))
    assert made.share(out) == pytest.approx(alone.share(out) * 29 / 28)


def test_a_short_prefill_has_no_larger_rows() -> None:
    assert max(product.rows for product in plan(4, step_tokens=100).settings) == 128
    assert max(product.rows for product in plan(4, step_tokens=3).settings) == 4


TOWER = (
    Part(
        Layer(5120, 1280, LinearParameters(1e-6, "layer", "quick_gelu", "int8"), bias=True, residual=False),
        32,
        fewest=256,
    ),
    Part(Layer(1280, 5120, LinearParameters(path="int8"), bias=True, residual=True), 32, fewest=256),
    Part(Layer(1536, 5120, LinearParameters(path="int8"), bias=True, residual=False), 1, fewest=64),
)


def test_a_towers_products_are_measured_from_its_usual_rows_on_and_decoding_comes_first() -> None:
    with_tower, without = plan_for(QWEN2_VL_2B, {1, 32}, 1056, TOWER), plan_for(QWEN2_VL_2B, {1, 32}, 1056)
    added = with_tower.settings.keys() - without.settings.keys()
    assert {(product.kernel, product.n, product.k, product.rows) for product in added} == {
        (kernel, n, k, 1 << bits)
        for kernel in ("int8", "float")
        for n, k, fewest in ((5120, 1280, 8), (1280, 5120, 8), (1536, 5120, 6))
        for bits in range(fewest, 13)
    }
    assert with_tower.compared == without.compared
    assert gemv_rows(with_tower, {}) == gemv_rows(without, {})
    largest = max(with_tower.share(product) for product in added)
    assert largest < max(with_tower.share(product) for product in without.settings)
    choices = measure(with_tower, preferring(1))
    assert choices.keys() == with_tower.settings.keys()
    assert sum(choice.seconds is not None for choice in choices.values()) > len(without.settings) / 2


def measure(plan: Plan, times: Callable[[Product, Tile], float | None], **known: object) -> dict[Product, Choice]:
    bench = FakeBench(times)
    return measured(plan, plan.settings, {}, bench, CHIP, budget=BUDGET_S, batch=32, clock=bench.clock)


def preferring(position: int) -> Callable[[Product, Tile], float]:
    """One neighbour of each default is twice as fast."""

    def times(product: Product, tile: Tile) -> float:
        return 1e-6 if tile == [*candidates(product)][position] else 2e-6

    return times


def test_every_product_gets_a_choice_that_is_a_candidate_of_it() -> None:
    made = plan()
    choices = measure(made, preferring(1))
    assert choices.keys() == made.settings.keys()
    assert all(choice.tile in [*candidates(product)] for product, choice in choices.items())
    assert any(choice.tile != next(candidates(product)) for product, choice in choices.items())


def test_fewer_rows_than_a_tile_has_take_the_tile_of_16_and_a_time_of_their_own() -> None:
    made = plan()
    bench = FakeBench(lambda product, tile: preferring(1)(product, tile) * product.rows)
    choices = measured(made, made.settings, {}, bench, CHIP, budget=BUDGET_S, batch=32, clock=bench.clock)
    assert {product.rows for product in made.compared} == {2, 4, 8}
    for product in made.compared:
        assert len({tile for asked, tile in bench.compiled if asked == product}) <= 2
        like = choices[replace(product, rows=16)]
        assert choices[product].tile == like.tile
        assert like.seconds is not None
        assert choices[product].seconds == pytest.approx(like.seconds * product.rows / 16)


def test_a_head_of_few_rows_takes_the_tile_of_the_most_that_it_sees() -> None:
    made = plan(8)
    head = [product for product in made.settings if product.n == QWEN2_VL_2B.vocab and product.kernel == "int8"]
    assert {product.rows: made.like(product).rows for product in head} == {2: 8, 4: 8, 8: 8}


def test_16_bit_rows_are_compiled_in_their_default_tile() -> None:
    made = plan()
    bench = FakeBench(preferring(1))
    measured(made, made.settings, {}, bench, CHIP, budget=BUDGET_S, batch=32, clock=bench.clock)
    compiled = [(product, tile) for product, tile in bench.compiled if product.kernel == "float"]
    assert {product for product, _ in compiled} == {product for product in made.settings if product.kernel == "float"}
    assert all(tile == next(candidates(product)) for product, tile in compiled)


def test_the_tile_of_16_may_be_known_from_before() -> None:
    made = plan()
    known = measure(made, preferring(1))
    missing = made.compared[:1]
    bench = FakeBench(preferring(1))
    found = measured(made, missing, known, bench, CHIP, budget=BUDGET_S, batch=8, clock=bench.clock)
    assert found == {missing[0]: known[missing[0]]}


@pytest.mark.parametrize("compile_s", [0.01, 0.1, 0.6])
def test_a_decoder_is_tuned_within_the_budget_and_defaults_fill_what_is_left(compile_s: float) -> None:
    made = plan(128)
    bench = FakeBench(preferring(1), compile_s=compile_s)
    choices = measured(made, made.settings, {}, bench, CHIP, budget=BUDGET_S, batch=32, clock=bench.clock)
    assert bench.now <= BUDGET_S
    assert choices.keys() == made.settings.keys()
    for product, choice in choices.items():
        assert choice.seconds is not None or choice.tile == next(candidates(product))


def with_seconds(plan: Plan, seconds: Callable[[Product], float | None]) -> dict[Product, Choice]:
    return {product: Choice(next(candidates(product)), seconds(product)) for product in plan.settings}


@pytest.mark.parametrize(
    ("slower_from", "expected"), [(2, 1), (4, 2), (8, 4), (16, 8)], ids=["never", "to 2", "to 4", "to 8"]
)
def test_rows_switch_to_tensor_cores_where_those_are_faster(slower_from: int, expected: int) -> None:
    def seconds(product: Product) -> float:
        return (
            2e-6
            if product.kernel == "gemv" and product.rows >= slower_from
            else 1e-6
            if product.kernel == "gemv"
            else 1.5e-6
        )

    assert gemv_rows(plan(), with_seconds(plan(), seconds)) == expected


def test_equal_times_and_unknown_ones_leave_the_default_switch() -> None:
    for slots in (1, 2, 8, 32):
        made = plan(slots)
        assert gemv_rows(made, with_seconds(made, lambda _: 1e-6)) == GEMV_ROWS
        for noise in (-0.01, 0.01):
            seconds = with_seconds(made, lambda product, noise=noise: 1e-6 * (1 + noise * (product.kernel == "gemv")))  # type: ignore[misc]
            assert gemv_rows(made, seconds) == GEMV_ROWS
        assert gemv_rows(made, with_seconds(made, lambda _: None)) == GEMV_ROWS
        assert gemv_rows(made, {}) == GEMV_ROWS


def test_the_switch_weighs_products_by_how_often_they_run() -> None:
    """The head alone is faster on tensor cores, by more than a layer loses, and by less than all of them."""
    made = plan()

    def seconds(product: Product) -> float:
        head = product.n == QWEN2_VL_2B.vocab
        return (10e-6 if head else 1e-6) if product.kernel == "gemv" else (1e-6 if head else 1.5e-6)

    assert gemv_rows(made, with_seconds(made, seconds)) == 8


class Measuring:
    """What measures; counts how often, and what was missing."""

    def __init__(self, error: Exception | None = None, seconds: float | None = 1e-6) -> None:
        self.missing: list[set[Product]] = []
        self.error, self.seconds = error, seconds

    def __call__(self, missing: Mapping[Product, Setting], known: Mapping[Product, Choice]) -> dict[Product, Choice]:
        self.missing.append(set(missing))
        if self.error is not None:
            raise self.error
        return {product: Choice([*candidates(product)][-1], self.seconds) for product in missing}


@pytest.fixture
def store(tmp_path: Path) -> TileStore:
    return TileStore(tmp_path / "kernels", CHIP, "bfloat16")


def test_the_next_start_measures_nothing_and_gets_the_same(store: TileStore) -> None:
    first, second = Measuring(), Measuring()
    choices = kept_or_measured(store, plan(), first, timeout=1)
    assert first.missing == [plan().settings.keys()]
    assert kept_or_measured(TileStore(store.file.parent, CHIP, "bfloat16"), plan(), second, timeout=1) == choices
    assert not second.missing


def test_a_larger_batch_measures_what_is_new(store: TileStore) -> None:
    before, both = plan(8), plan(32)
    kept_or_measured(store, before, Measuring(), timeout=1)
    measuring = Measuring()
    choices = kept_or_measured(store, both, measuring, timeout=1)
    assert measuring.missing == [both.settings.keys() - before.settings.keys()]
    assert choices.keys() == both.settings.keys()


def test_switched_off_takes_what_is_kept_and_measures_nothing(store: TileStore) -> None:
    assert kept_or_measured(store, plan(), None, timeout=1) == {}
    choices = kept_or_measured(store, plan(), Measuring(), timeout=1)
    assert kept_or_measured(store, plan(), None, timeout=1) == choices


def test_replicas_that_start_together_are_tuned_once_and_alike(store: TileStore) -> None:
    measuring, results = Measuring(), []

    def start() -> None:
        own = TileStore(store.file.parent, CHIP, "bfloat16")
        results.append(kept_or_measured(own, plan(), measuring, timeout=30))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measuring.missing) == 1
    assert len(results) == 4
    assert all(result == results[0] for result in results)


def test_what_cannot_be_kept_is_not_measured(store: TileStore) -> None:
    store.file.parent.write_bytes(b"")
    measuring = Measuring()
    assert kept_or_measured(store, plan(), measuring, timeout=1) == {}
    assert not measuring.missing


def test_a_device_without_memory_is_tuned_at_a_later_start(store: TileStore) -> None:
    for _ in range(5):
        with pytest.raises(torch.OutOfMemoryError):
            kept_or_measured(store, plan(), Measuring(torch.OutOfMemoryError()), timeout=1)
    measuring = Measuring()
    kept_or_measured(store, plan(), measuring, timeout=1)
    assert measuring.missing


def test_a_device_that_tuning_breaks_is_left_alone_after_two_starts(store: TileStore) -> None:
    for _ in range(2):
        with pytest.raises(torch.AcceleratorError):
            kept_or_measured(store, plan(), Measuring(torch.AcceleratorError("illegal address")), timeout=1)
    measuring = Measuring()
    assert kept_or_measured(store, plan(), measuring, timeout=1) == {}
    assert not measuring.missing


def test_where_no_kernel_ran_nothing_is_kept(store: TileStore) -> None:
    kept_or_measured(store, plan(), Measuring(seconds=None), timeout=1)
    assert store.read(plan().settings) == {}


def test_the_checksum_of_sources_is_that_of_files_that_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(tuning.__file__).parent
    copy = tmp_path / "kernels"
    for name in tuning._SOURCES:
        for file in (folder / name).glob("*.py") if (folder / name).is_dir() else [folder / name]:
            target = copy / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    before = tuning._sources()
    monkeypatch.setattr(tuning, "__file__", str(copy / "tuning.py"))
    assert tuning._sources() == before
    (copy / "linear" / "gemm.py").write_text("# faster\n")
    assert tuning._sources() != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_small_decoder_is_tuned_on_a_gpu_and_read_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 0)
    spec = replace(QWEN2_VL_2B, layers=2, hidden=512, heads=4, intermediate=1024, vocab=4096)

    def start(rows: Collection[int]) -> tuple[int, dict[Product, Tile]]:
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            tiles = tuning.tuned_tiles(
                spec, device=device, dtype=torch.bfloat16, folder=tmp_path, decode_rows=rows, step_tokens=300, budget=20
            )
        return tiles.gemv_rows, tiles._measured

    first = start([1, 2, 4, 8])
    assert first[1].keys() == plan_for(spec, [1, 2, 4, 8], 300).settings.keys()
    monkeypatch.setattr(tuning, "measured", lambda *_, **__: pytest.fail("the next start measures nothing"))
    assert start([1, 2, 4, 8]) == first
