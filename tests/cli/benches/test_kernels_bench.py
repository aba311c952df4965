"""`bench kernels`: what its limits count, kernel_bench_cases.py interpreted, and its ladder on a device that is not
there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cli.__main__ import main
from cli.benches import limits
from cli.benches.step_ladder import RUNGS
from cli.benches.step_work import attention_work, in_step, layers_of, step_work
from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.config import EngineConfig
from engine.errors import KernelsUnavailable
from engine.replica import Replica
from engine.runners.fusion import Parts
from tests.cli.benches.conftest import Bench
from tests.cuda.fake_device import FakeGpu
from tests.kernels.triton_tests import run_cases

CASES = Path(__file__).with_name("kernel_bench_cases.py")
DEMO = Path(__file__).resolve().parents[3] / "demo"


def test_interpreted_kernels_compute_what_they_are_compared_with() -> None:
    pytest.importorskip("triton")
    run_cases(CASES, interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_and_what_they_are_compared_with_are_captured_and_timed() -> None:
    run_cases(CASES, interpreted=False)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return open_artifact(Checkpoint.open(DEMO), "int8", tmp_path_factory.mktemp("storage"))


def test_a_steps_kernels_compute_what_the_whole_step_does(artifact: Artifact) -> None:
    spec, rows, context = artifact.spec.decoder, 8, 100
    whole = limits.decode_cost(artifact, rows, rows * context, 0)
    products = sum(layer.count * layer.cost(rows).operations for layer in layers_of(spec))
    attention = attention_work(spec, rows, context, int8=False)
    assert whole.operations == products + attention.count * attention.cost.operations


def test_a_steps_kernels_read_the_weights_of_the_whole_step(artifact: Artifact) -> None:
    """But for norms and biases, which are wider on disk than on the device."""
    weights = sum(layer.count * layer.cost(0).bytes for layer in layers_of(artifact.spec.decoder))
    assert weights == pytest.approx(limits.decode_cost(artifact, 1, 0, 0).bytes, rel=0.005)


def test_a_linear_layer_counts_what_its_kernel_takes_along(artifact: Artifact) -> None:
    spec = replace(artifact.spec.decoder, hidden=100, intermediate=300, qkv_bias=True, mlp_bias=False)
    qkv, out, gate, *_ = layers_of(spec)
    assert qkv.cost(5).bytes == qkv.n * 100 + 4 * qkv.n + 2 * (qkv.n + 100) + 2 * 5 * (100 + qkv.n)
    assert out.cost(5).bytes == 100 * out.k + 4 * 100 + 2 * 5 * (out.k + 2 * 100)
    assert (gate.n, gate.width) == (600, 300)
    assert gate.cost(5).bytes == 600 * 100 + 4 * 600 + 2 * 100 + 2 * 5 * (100 + 300)


def test_a_step_has_attention_over_one_kind_of_cache_and_nothing_twice(artifact: Artifact) -> None:
    works = step_work(artifact.spec.decoder, 4, 512)
    wide, int8 = (in_step(works, int8_cache=int8) for int8 in (False, True))
    assert {work.name for work in wide} ^ {work.name for work in int8} == {
        "attention, 16-bit cache",
        "attention, int8 cache",
    }
    assert {work.name for work in works} - {work.name for work in wide} - {work.name for work in int8} == {
        "sampling, mixed",
        "norm, int8 rows",
    }
    (attention,) = (work for work in int8 if work.name.startswith("attention"))
    cached = 4 * 512 * 2 * artifact.spec.decoder.kv_heads * artifact.spec.decoder.head_dim
    assert attention.cost.bytes - cached < attention.cost.bytes / 10


def test_copies_are_enough_to_wash_a_cache_and_never_too_many() -> None:
    pytest.importorskip("triton")
    from cli.benches.device_time import MOST_COPIES, copies_of

    assert copies_of(2_000_000, 50_000_000) == 51
    assert copies_of(230_000_000, 50_000_000) == 2
    assert copies_of(1, 50_000_000) == MOST_COPIES
    assert copies_of(100, 0) == 1


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Parts]:
    """The parts that each engine's replica was opened with, on a GPU that is not there."""
    fake, found = FakeGpu(), list[Parts]()

    def open_cuda(name: str, artifact: Artifact, config: EngineConfig, index: int, parts: Parts) -> Replica:
        found.append(parts)
        if parts.fusion.attention and not parts.torch_sampling:
            raise KernelsUnavailable("there is no C compiler")
        return fake.open(name, artifact, config, index)

    monkeypatch.setattr("cli.benches.kernels.resolve", fake.devices)
    monkeypatch.setattr("engine.engine.resolve", fake.devices)
    monkeypatch.setattr("engine.runners.open_cuda.open_cuda", open_cuda)
    monkeypatch.setattr("cli.benches.limits.measure_rates", lambda *_: limits.Rates(1e9, None, None))
    return found


def test_the_ladder_takes_one_part_after_the_other_and_survives_one_that_cannot_be_had(
    bench: Bench, opened: list[Parts]
) -> None:
    words = ["--only", "ladder", "--no-tuning", "--device", "cuda", "--batch", "1,2", "--context", "64", "--steps", "4"]
    result = bench("kernels", *words, code=1)
    assert opened == [Parts(rung.fusion, torch_sampling=rung.torch_sampling, tuning=False) for rung in RUNGS]
    *rows, last = result["rows"]
    assert [row["row"] for row in rows] == [f"B={batch} {rung.name}" for rung in RUNGS[:-1] for batch in (1, 2)]
    assert last == {"row": "+ sampling", "error": "KernelsUnavailable: there is no C compiler"}
    for row, first in zip(rows, [*rows[:2]] * 4, strict=True):
        assert row["times"] == pytest.approx(first["step_ms"]["median"] / row["step_ms"]["median"], abs=0.01)
    assert "norms are part of our int8 linear layers" in result["card"]["ladder"]
    assert [entry["row"] for entry in result["card"]["memory"]] == [rung.name for rung in RUNGS[:-1]]


def test_without_a_gpu_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--device", "cpu"]) == 1
    assert "measures one CUDA device" in capsys.readouterr().err


def test_the_setting_that_it_compares_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--kernel-fusion", "on"]) == 1
    assert "leave --kernel-fusion out" in capsys.readouterr().err
