"""./tessera doctor says what there is, and what is wrong with it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cli import doctor
from cli.memory import Entry
from engine import device
from engine.device import Devices, Gpu
from tests.plugin.fake_plugin import copy_with_fake_engine


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(autouse=True)
def fake_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plugin"
    folder.mkdir()
    monkeypatch.setattr(doctor, "ROOT", copy_with_fake_engine(folder))
    monkeypatch.setattr(doctor, "opened_memory", lambda settings, model: [occupied(model, n) for n in range(2)])


def occupied(model: str, gpu: int) -> Entry:
    """What a replica tells of itself (tests/cli/test_memory.py asks a real one)."""
    sizes = {"weights": 3000 << 20, "kv": 60_000 << 20, "kv_per_token": 1 << 15, "workspace": 700 << 20}
    where = {"model": model, "device": f"cuda:{gpu}", "precision": "fp16"}
    return where | sizes | {"host": 2 << 30, "kv_tokens": 1_920_000}


def test_a_healthy_machine_has_a_line_for_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(parse("--storage", str(tmp_path / "storage"))) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == [
        "python",
        "packages",
        "processor",
        "memory",
        "onnxruntime",
        "gpu",
        "device",
        "storage",
        "demo",
        "model",
    ]
    assert "CPU" in lines["onnxruntime"]
    assert lines["demo"].startswith("answers")


def test_each_replica_of_the_model_that_was_tried_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.run(parse("--storage", str(tmp_path)))
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("model"))
    sizes = "weights 3,000 MiB, KV 60,000 MiB for 1,920,000 tokens, workspace 700 MiB, host 2,048 MiB"
    assert first == f"model        demo on cuda:0, fp16: {sizes}"
    assert second == f"model        demo on cuda:1, fp16: {sizes}"


def shown_on(
    gpus: list[Gpu], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> dict[str, str]:
    """Doctor's lines on a machine with these GPUs; with none, there is no driver either."""
    if gpus:
        monkeypatch.setattr(doctor, "installed_gpus", lambda: gpus)
        monkeypatch.setattr(doctor, "resolve", lambda config: Devices(tuple(gpus)))
        monkeypatch.setattr(doctor, "driver_cuda", lambda: 13_010)
    else:
        monkeypatch.setattr(device, "DRIVER", "libnothing.so.1")
    doctor.run(parse(*words))
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_a_gpu_is_shown_with_what_matters_and_that_it_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = [Gpu(1, "H100", (9, 0), 70 << 30, 80 << 30)]
    lines = shown_on(gpus, monkeypatch, capsys, "--storage", str(tmp_path))
    assert lines["gpu"].startswith("cuda:1 H100, compute capability 9.0, 71680 of 81920 MiB free; driver ")
    assert lines["gpu"].endswith("(CUDA 13.1)")
    assert lines["device"] == "auto: models run on cuda:1"


def test_without_a_gpu_auto_says_why_it_takes_the_cpu_and_cuda_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = ("--storage", str(tmp_path))
    why = "there is no NVIDIA driver"
    lines = shown_on([], monkeypatch, capsys, *storage)
    assert lines["gpu"].startswith(f"none: {why}")
    assert lines["device"].startswith(f"auto: models run on the CPU, because {why}")
    assert shown_on([], monkeypatch, capsys, *storage, "--device", "cpu")["device"] == "cpu: models run on the CPU"
    asked = shown_on([], monkeypatch, capsys, *storage, "--device", "cuda")
    assert asked["device"].startswith(f"PROBLEM: CUDA was asked for, but {why}")


def test_a_problem_is_named_and_the_other_checks_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(parse("--storage", "/proc/tessera")) == 1
    output = capsys.readouterr().out
    assert "storage      PROBLEM: /proc/tessera cannot be used" in output
    assert "demo         answers" in output  # the fake engine stores nothing
