"""What the measurements make of what they see."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from cli.benches import limits
from cli.benches.decode import SteadySteps, steady
from cli.benches.in_process import StepLog
from cli.benches.report import Report, attempt
from cli.benches.soak import fault, growth
from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.errors import QueueFull
from engine.request import Finished, FinishReason, Message, Request, SamplingParams, Text, Timings, Usage
from engine.runtime.cuda import trace
from engine.runtime.cuda.trace import kernel_times
from engine.stats import StepRecord

DEMO = Path(__file__).resolve().parents[3] / "demo"


def _step(finished: float, rows: int, prefill: int = 0, images: int = 0) -> StepRecord:
    return StepRecord("m", finished - 0.5, finished, 0.1, rows, 10 * rows, prefill, images, rows)


def test_only_the_distance_between_two_full_and_pure_decode_steps_is_a_step_time() -> None:
    records = [_step(1, 2, prefill=5), _step(2, 4), _step(4, 4), _step(5, 4, images=1), _step(6, 4), _step(6.5, 4)]
    assert [seconds for seconds, _ in steady([*records, _step(9, 3)], 4)] == [2.0, 0.5]


def test_waiting_looks_at_each_step_once_and_from_where_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    log, seen = StepLog(), list[float]()
    log(_step(0, 1))
    rest = [_step(number, 1) for number in range(1, 5)]
    monkeypatch.setattr(time, "sleep", lambda _: log(rest.pop(0)))  # a step between every two looks

    def enough(record: StepRecord) -> bool:
        seen.append(record.finished_s)
        return len(seen) == 3

    assert [record.finished_s for record in log.wait(enough, [], first=1)] == [1, 2, 3]
    assert seen == [1, 2, 3]


def test_counting_steps_as_they_come_agrees_with_sorting_them_out_afterwards() -> None:
    rows = [2, 4, 4, 4, 3, 4, 4, 4]
    records = [_step(at, count, images=int(at == 6)) for at, count in enumerate(rows)]
    for wanted in range(1, 4):
        counting = SteadySteps(4, ["cuda:0"], wanted)
        enough = next(
            (n for n, one in enumerate(records) if counting(dataclasses.replace(one, device="cuda:0"))), len(records)
        )
        assert len(steady(records[: enough + 1], 4)) == min(wanted, 2)
        assert (enough < len(records)) == (wanted <= 2)


def test_of_several_devices_the_slowest_decides_when_there_are_steps_enough() -> None:
    counting = SteadySteps(4, ["cuda:0", "cuda:1"], 2)
    step = [dataclasses.replace(_step(1, 4), device=f"cuda:{number}") for number in range(2)]
    assert [counting(step[0]) for _ in range(9)] == [False] * 9
    assert [counting(step[1]) for _ in range(3)] == [False, False, True]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    storage = tmp_path_factory.mktemp("storage")
    checkpoint = Checkpoint.open(DEMO)
    return {"fp32": open_artifact(checkpoint, "fp32", storage), "int8": open_artifact(checkpoint, "int8", storage)}


def test_a_decode_step_reads_its_weights_once_and_every_sequence_its_own_keys(artifacts: dict[str, Artifact]) -> None:
    artifact = artifacts["fp32"]
    decoder = artifact.spec.decoder
    matrices = decoder.layers * (
        decoder.hidden * (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim
        + decoder.heads * decoder.head_dim * decoder.hidden
        + 3 * decoder.hidden * decoder.intermediate
    )
    matrices += decoder.vocab * decoder.hidden  # the head, tied to the embedding
    norms = (2 * decoder.layers + 1) * decoder.hidden
    one, many = (limits.decode_cost(artifact, rows, 100 * rows, 2048) for rows in (1, 8))
    assert one.bytes == 4 * (matrices + norms) + 100 * 2048
    assert many.bytes - one.bytes == 700 * 2048
    assert many.operations == 8 * one.operations
    assert one.operations == 2 * matrices + 4 * decoder.layers * decoder.heads * decoder.head_dim * 100


def test_int8_weights_cost_a_quarter_of_the_bytes_and_the_same_operations(artifacts: dict[str, Artifact]) -> None:
    wide, narrow = (limits.decode_cost(artifacts[name], 1, 0, 0) for name in ("fp32", "int8"))
    assert 3.5 < wide.bytes / narrow.bytes < 4
    assert wide.operations == narrow.operations


def test_a_prompt_costs_as_much_as_its_tokens_one_by_one_less_their_heads(artifacts: dict[str, Artifact]) -> None:
    artifact, tokens = artifacts["fp32"], 64
    head = 2 * artifact.spec.decoder.vocab * artifact.spec.decoder.hidden
    alone = sum(limits.decode_cost(artifact, 1, length, 0).operations - head for length in range(1, tokens + 1))
    assert limits.prefill_cost(artifact, 1, tokens, 0).operations == alone + head


def test_the_towers_connector_runs_on_merged_patches_only(artifacts: dict[str, Artifact]) -> None:
    artifact = artifacts["fp32"]
    vision = artifact.spec.vision
    assert vision is not None
    layer = 4 * vision.hidden**2 + 2 * vision.hidden * vision.intermediate
    each = vision.layers * layer + 3 * vision.patch**2 * vision.hidden
    joined = 4 * vision.hidden * artifact.spec.decoder.hidden
    attention = 4 * vision.layers * vision.hidden * 64 * 64
    assert limits.tower_cost(artifact, 3, 64).operations == 3 * (2 * (each * 64 + joined * 16) + attention)


def test_the_limit_is_the_slower_of_reading_and_computing() -> None:
    rates = limits.Rates(copy=100.0, matmul=10.0, matmul_dtype="float32")
    assert rates.limit_s(limits.Cost(bytes=1000, operations=50)) == 10.0
    assert rates.limit_s(limits.Cost(bytes=100, operations=50)) == 5.0
    assert limits.Cost(1000, 50).against(rates, 20.0)["share"] == 0.5
    unknown = limits.Rates(copy=100.0, matmul=None, matmul_dtype=None)
    assert unknown.limit_s(limits.Cost(bytes=100, operations=10**9)) == 1.0


def test_this_machines_rates_are_those_of_a_computer() -> None:
    rates = limits.measure_rates("cpu", "fp32")
    assert 1e8 < rates.copy < 1e13
    assert rates.matmul is not None
    assert 1e8 < rates.matmul < 1e14
    assert limits.measure_rates("cpu", "int8").matmul is None


def test_a_row_that_cannot_be_measured_leaves_the_others_and_fails_the_bench() -> None:
    def refuse() -> dict[str, int]:
        raise QueueFull("the queue is full")

    rows = [attempt("one", lambda: {"value": 1}), attempt("two", refuse)]
    assert rows == [{"row": "one", "value": 1}, {"row": "two", "error": "QueueFull: the queue is full"}]
    assert Report(rows[:1]).is_good
    assert not Report(rows).is_good
    assert not Report([]).is_good
    assert not Report([{"row": "x", "failed": 1}]).is_good
    with pytest.raises(ZeroDivisionError):  # a bug is not a row
        attempt("three", lambda: {"value": 1 // 0})


def _ended(reason: FinishReason, tokens: int) -> Finished:
    return Finished(reason, Usage(5, tokens), Timings(0, 0, 0))


@pytest.mark.parametrize(
    ("streamed", "last", "words"),
    [
        (10, _ended("length", 10), None),
        (9, _ended("length", 10), None),  # the last one had no text
        (11, _ended("length", 10), "fewer tokens in the usage"),
        (0, _ended("length", 10), "more tokens in the usage"),
        (8, _ended("length", 8), "at another length"),
        (8, _ended("stop", 8), "nothing to stop at"),
        (10, None, "without its last event"),
    ],
)
def test_a_soak_sees_lost_and_duplicated_tokens(streamed: int, last: Finished | None, words: str | None) -> None:
    sampling = SamplingParams(max_tokens=10, ignore_eos=True)
    found = fault(Request("demo", (Message("user", (Text("?"),)),), sampling), streamed, last)
    assert found is None if words is None else found is not None and words in found


def test_memory_that_fills_up_in_the_first_minute_does_not_grow_and_a_leak_does() -> None:
    settled = [(5.0 * at, 100 + min(at, 12) * 50) for at in range(96)]
    leak = [(5.0 * at, 700 + at) for at in range(96)]
    assert growth(settled, 32) == {"first": 700, "last": 700, "growth": 0, "peak": 700, "grows": False}
    grown = growth(leak, 32)
    assert grown is not None
    assert grown["grows"]
    assert growth([], 32) is None


def test_overlapping_kernels_count_once_as_busy_time() -> None:
    times = kernel_times([("b", 2.0, 5.0), ("a", 1.0, 3.0), ("a", 8.0, 9.0)], 10.0)
    assert (times.busy_s, times.kernel_s, times.kernels, times.kernel_share) == (5.0, 6.0, 3, 0.5)
    assert times.top == [("a", 2, 3.0), ("b", 1, 3.0)]
    assert kernel_times([], 2.0).kernel_share == 0.0


def test_an_engine_in_another_process_traces_when_a_file_asks_it_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "trace_kernels", lambda work: kernel_times([("a", 0.0, 1.0)], 4.0))
    trace.serve_traces(tmp_path)
    (tmp_path / "seconds").write_text("0.1")
    deadline = time.monotonic() + 10
    while not (tmp_path / "trace.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert json.loads((tmp_path / "trace.json").read_text())["kernel_share"] == 0.25
    assert not (tmp_path / "seconds").exists()


@pytest.mark.gpu
def test_a_trace_sees_what_the_device_computes() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    matrix = torch.ones(2048, 2048, device="cuda")

    def work() -> None:
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()

    times = trace.trace_kernels(work)
    assert times.kernels >= 20
    assert 0 < times.kernel_share <= 1
