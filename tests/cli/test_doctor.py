"""./tessera doctor says what there is, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli import checks, doctor
from cli.memory import Entry
from engine import device
from engine.checkpoints import Checkpoint
from engine.config import EngineConfig
from engine.device import Devices, Gpu
from engine.errors import KernelsUnavailable
from engine.metrics import Metrics, MetricsServer
from tests.plugin.fake_plugin import copy_with_fake_engine

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plugin is started for what is not about the demo."""
    monkeypatch.setattr(doctor, "_demo", lambda settings: "answers")


def occupied(model: str, gpu: int) -> Entry:
    """What a replica tells of itself (tests/cli/test_memory.py asks a real one)."""
    sizes = {"weights": 3000 << 20, "kv": 60_000 << 20, "kv_per_token": 1 << 15, "workspace": 700 << 20}
    where = {"model": model, "device": f"cuda:{gpu}", "precision": "fp16"}
    return where | sizes | {"host": 2 << 30, "kv_tokens": 1_920_000}


def test_a_healthy_machine_has_a_line_for_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(parse("--storage", str(tmp_path / "storage"))) == 0
    lines = by_name(capsys.readouterr().out)
    assert list(lines) == [
        "python",
        "packages",
        "processor",
        "memory",
        "onnxruntime",
        "gpu",
        "libraries",
        "device",
        "precision",
        "compiler",
        "storage",
        "models",
        "port",
        "demo",
        "model",
    ]
    assert "CPU" in lines["onnxruntime"]
    assert lines["demo"].startswith("answers")


def by_name(output: str) -> dict[str, str]:
    """The last line of each name."""
    return dict(line.split(maxsplit=1) for line in output.splitlines())


@pytest.mark.usefixtures("quick")
def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(parse("--storage", str(tmp_path), "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {finding["name"] for finding in told["findings"]} >= {"python", "storage", "port", "demo"}
    assert all(finding["ok"] and finding["text"] for finding in told["findings"])


@pytest.mark.usefixtures("quick")
def test_settings_that_are_none_are_one_problem_and_what_the_machine_has_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.run(parse("--set", "max_waiting=many")) == 1
    lines = by_name(capsys.readouterr().out)
    assert lines["settings"] == "PROBLEM: max_waiting is 'many'; it must be a number"
    assert "memory" in lines
    assert "demo" not in lines


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("precision", "line"),
    [
        ("auto", "auto: weights are kept as int8"),
        ("fp32", "fp32: weights are kept as fp32"),
        ("fp16", "PROBLEM: precision fp16 needs a CUDA device"),
    ],
)
def test_the_precision_is_what_it_comes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str, line: str
) -> None:
    lines = shown_on([], monkeypatch, capsys, "--storage", str(tmp_path), "--precision", precision)
    assert lines["precision"].startswith(line)


@pytest.mark.usefixtures("quick")
def test_models_are_listed_with_their_sizes_and_a_folder_that_is_none_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "demo", tmp_path / "models" / "mine")
    (tmp_path / "models" / "mine" / "extra.bin").write_bytes(bytes(5 << 20))
    (tmp_path / "models" / "half").mkdir()
    (tmp_path / "models" / ".under-way").mkdir()
    assert doctor.run(parse("--storage", str(tmp_path))) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("models")]
    demo, half, mine = (line.split(maxsplit=1)[1] for line in lines)
    assert demo.startswith("demo: smolvlm, ")
    assert half.startswith("PROBLEM: half: ")
    assert "config.json" in half
    sizes = [int(line.split(",")[1].split()[0]) for line in (demo, mine)]
    assert sizes[1] - sizes[0] in (4, 5, 6)


def test_a_model_whose_activations_need_bfloat16_runs_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(Checkpoint.open(ROOT / "demo").spec, wide_activations=True)
    monkeypatch.setattr(Checkpoint, "open", lambda folder: SimpleNamespace(spec=spec))
    h100 = Gpu(0, "H100", (9, 0), 80 << 30, 80 << 30)
    demo, _ = checks.models(EngineConfig(storage=tmp_path), Devices((h100,)))
    assert str(demo).endswith("runs in bf16")


@pytest.mark.usefixtures("quick")
def test_a_disk_without_room_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert doctor.run(parse("--storage", str(tmp_path))) == 1
    assert "PROBLEM: 3 MiB are too few" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_port_that_another_program_has_is_a_problem_and_an_engines_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = ("--storage", str(tmp_path))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = other.getsockname()[1]
        closer = threading.Thread(target=_hang_up, args=(other,), daemon=True)
        closer.start()
        assert doctor.run(parse(*storage, "--set", f"metrics_port={number}")) == 1
        closer.join()
    assert f"PROBLEM: port {number} of 127.0.0.1 is taken" in by_name(capsys.readouterr().out)["port"]
    server = MetricsServer(number, Metrics(lambda: {"open_requests": 0, "models": {}}).registry)
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", number)) == 0:
                    break
        assert doctor.run(parse(*storage, "--set", f"metrics_port={number}")) == 0
    finally:
        server.close()
    assert by_name(capsys.readouterr().out)["port"].startswith(f"{number} is served by a running engine")
    assert doctor.run(parse(*storage, "--set", f"metrics_port={number}")) == 0
    assert by_name(capsys.readouterr().out)["port"] == f"{number} is free for metrics"


def _hang_up(listening: socket.socket) -> None:
    listening.settimeout(30)
    connection, _ = listening.accept()
    connection.close()


def test_a_missing_package_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PACKAGES", ("numpy", "a_package_that_is_missing"))
    with pytest.raises(checks.Unfit, match="a_package_that_is_missing not installed: pip install -r"):
        checks.packages()
    monkeypatch.setattr(checks, "PACKAGES", ("numpy",))
    (tmp_path / "requirements.txt").write_text("numpy==0.1\n")
    assert checks.packages(tmp_path / "requirements.txt").endswith("(tested with 0.1)")


def test_kernels_that_are_insisted_on_need_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu = Devices((Gpu(0, "H100", (9, 0), 70 << 30, 80 << 30),))
    assert "a CPU does not" in checks.compiler(EngineConfig(), gpu)
    with pytest.raises(KernelsUnavailable, match="apt install gcc"):
        checks.compiler(EngineConfig(kernel_fusion="on"), gpu)


def test_a_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe:
        def missing(self, libraries: list[str]) -> list[str]:
            return [library for library in libraries if "curand" in library]

    monkeypatch.setattr(checks, "driver_cuda", lambda: 13_010)
    monkeypatch.setattr(checks, "machine_probe", Probe)
    with pytest.raises(checks.Unfit, match=r"libcurand.so.10 cannot be loaded: pip install nvidia-curand"):
        checks.libraries()


@pytest.mark.usefixtures("quick")
def test_each_replica_of_the_model_that_was_tried_has_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.run(parse("--storage", str(tmp_path)))
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("model "))
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
    return by_name(capsys.readouterr().out)


@pytest.mark.usefixtures("quick")
def test_a_gpu_is_shown_with_what_matters_and_that_it_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = [Gpu(1, "H100", (9, 0), 70 << 30, 80 << 30)]
    lines = shown_on(gpus, monkeypatch, capsys, "--storage", str(tmp_path))
    assert lines["gpu"].startswith("cuda:1 H100, compute capability 9.0, 71680 of 81920 MiB free; driver ")
    assert lines["gpu"].endswith("(CUDA 13.1)")
    assert lines["device"] == "auto: models run on cuda:1"


@pytest.mark.usefixtures("quick")
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
