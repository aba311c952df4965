"""./tessera doctor says what there is, and what is wrong with it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cli import doctor
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
    ]
    assert "CPU" in lines["onnxruntime"]
    assert lines["demo"].startswith("answers")


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
