"""`bench kernels` on a GPU, or with Triton's interpreter and a timer that needs none; run by test_kernels_bench.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cli.benches import limits
from cli.benches.device_time import GraphTimer, Launch
from cli.benches.kernel_pairs import Pair, Place, pairs
from cli.benches.kernels import Rates, batch_rows
from cli.benches.report import BenchError
from cli.benches.step_work import step_work
from engine.kernels.operators import Device, workspace_bytes
from engine.kernels.tiles import Tiles
from engine.kernels.workspace import Workspace
from engine.spec import DecoderSpec, RopeSpec

CONTEXT, BLOCK, CHIP = 24, 16, 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPEC = DecoderSpec(
    layers=3,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=48,
    vocab=40,
    norm_eps=1e-6,
    rope=RopeSpec((1.0,) * 8),
    context_length=256,
    qkv_bias=True,
    attention_out_bias=False,
    mlp_bias=False,
    tied_head=True,
)
MROPE = replace(SPEC, rope=RopeSpec((1.0,) * 8, mrope_section=(2, 3, 3)), attention_out_bias=True)
RATES = Rates(limits.Rates(1e12, 4e14, "int8"), limits.Rates(1e12, 2e14, "float16"))


def place_of(spec: DecoderSpec, rows: int) -> Place:
    tiles = Tiles()
    decoding = [(batch, 32) for batch in range(1, rows + 1)]
    nbytes = workspace_bytes(spec, tiles, CHIP, rows=rows, decoding=decoding, block_size=BLOCK)
    return Place(Device(torch.float16, Workspace(nbytes, DEVICE), tiles, CHIP), 0, BLOCK)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    return bool(error < 0.03)  # of int8 rows


@pytest.mark.parametrize(("spec", "rows"), [(MROPE, 2), (SPEC, 6)])  # a GEMV, and products of quantised rows
def test_ours_computes_what_it_is_said_to_replace(spec: DecoderSpec, rows: int) -> None:
    torch.manual_seed(0)
    for work, make in pairs(spec, place_of(spec, rows), rows, CONTEXT):
        pair = make()
        for number in range(min(2, pair.copies)):
            ours, replaced = pair.ours(number), pair.replaced(number)
            assert isinstance(replaced, torch.Tensor)
            assert ours.shape == replaced.shape
            if work.name == "norm, int8 rows":  # without their scales
                ours = ours / ours.abs().amax(1, keepdim=True)
                replaced = replaced / replaced.abs().amax(1, keepdim=True)
            if work.name == "sampling, mixed":  # a draw that is nearly on an edge may fall to either side
                assert (ours == replaced).float().mean() > 0.4
            else:
                assert close(ours, replaced), f"{work.name}, {pair.kernel}"


def test_a_copy_has_numbers_of_its_own() -> None:
    place = replace(place_of(SPEC, 1), cache_bytes=600)
    for work, make in pairs(SPEC, place, 1, CONTEXT):
        pair = make()
        if work.name not in {"norm, int8 rows", "sampling, greedy", "sampling, mixed"}:
            assert pair.copies > 1
            assert not torch.equal(pair.ours(0).clone(), pair.ours(1)), work.name


def test_a_batch_has_a_row_for_each_kernel_and_a_sum_for_each_cache() -> None:
    seconds = iter(range(1, 100))

    def timer(launch: Launch, copies: int) -> float:
        return next(seconds) / 1e6

    *kernels, wide, int8 = batch_rows(SPEC, place_of(SPEC, 2), 2, CONTEXT, timer, RATES)
    assert [row["row"] for row in kernels] == [f"B=2 {work.name}" for work in step_work(SPEC, 2, CONTEXT)]
    assert [(row["replaced_us"], row["us"]) for row in kernels[:2]] == [(1, 2), (3, 4)]
    assert wide["row"] == "B=2 step, 16-bit cache"
    by_name = {row["row"].removeprefix("B=2 "): row for row in kernels}
    layers = sum(by_name[name]["us"] for name in ("qkv", "out", "gate, up, SiLU", "down"))
    once = sum(by_name[name]["us"] for name in ("embedding", "head", "sampling, greedy"))
    assert wide["us"] == once + 3 * (layers + by_name["attention, 16-bit cache"]["us"])
    assert int8["us"] == once + 3 * (layers + by_name["attention, int8 cache"]["us"])
    assert wide["count"] == int8["count"] == 3 + 3 * 5
    assert wide["times"] == pytest.approx(wide["replaced_us"] / wide["us"], abs=0.01)
    assert by_name["qkv"]["kernel"] == "gemv"
    assert by_name["qkv"]["replaces"] == "rms_norm, linear"


def test_a_kernel_that_does_not_run_is_an_error_of_its_row_and_of_the_sums_it_is_in() -> None:
    def timer(launch: Launch, copies: int) -> float:
        if "attention_pair" in repr(launch) and copies == 1:
            raise BenchError("out of shared memory")
        return 1e-6

    found = batch_rows(SPEC, place_of(SPEC, 1), 1, CONTEXT, timer, RATES)
    errors = {row["row"]: row["error"] for row in found if "error" in row}
    assert errors["B=1 attention, int8 cache"] == "BenchError: out of shared memory"
    assert errors["B=1 step, int8 cache"] == "not measured: attention, int8 cache"
    assert len(errors) == 4


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_every_kernel_and_what_it_replaces_can_be_captured_and_timed() -> None:
    for row in batch_rows(SPEC, place_of(SPEC, 6), 6, CONTEXT, GraphTimer(DEVICE), RATES):
        assert "error" not in row
        assert 0 < row["us"] < 1e4


def test_pairs_are_made_one_at_a_time() -> None:
    made = [make for _, make in pairs(SPEC, place_of(SPEC, 1), 1, CONTEXT)]
    assert not any(isinstance(one, Pair) for one in made)
