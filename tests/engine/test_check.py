"""What the form's check says about storage, compiler and GPUs, and that nothing can hold it up."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine import check as module
from engine import device
from engine.check import check, look
from engine.config import EngineConfig
from engine.errors import DeviceUnavailable, EngineError, InvalidConfig, StorageError


def looked(config: EngineConfig) -> list[dict[str, str]]:
    """What the process would write, asked in this one."""
    lines: list[dict[str, str]] = []
    settings = {name: str(value) for name, value in config.to_mapping().items()}
    try:
        look(json.dumps(settings), lines.append)
    except EngineError as error:
        lines.append({"error": error.code, "message": str(error)})
    return lines


def a_look_that_writes(*lines: str, then: str = "") -> tuple[str, ...]:
    written = "".join(f"print({line!r}, flush=True);" for line in lines)
    return (sys.executable, "-S", "-c", f"import time;{written}{then}")


def test_a_machine_that_is_fine_is_described(tmp_path: Path) -> None:
    findings = check(EngineConfig(storage=tmp_path, device="cpu"), limit_s=30)
    assert str(findings).startswith(f"storage: {tmp_path}, ")
    assert "MiB free; compiler: " in str(findings)
    assert findings.device == "the CPU"


def test_a_folder_that_is_not_there_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    check(EngineConfig(storage=folder, device="cpu"), limit_s=30)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(folder.iterdir())


def test_a_disk_with_too_little_room_is_named_with_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_mib", lambda folder: 3)
    *_, line = looked(EngineConfig(storage=tmp_path))
    assert line["error"] == "StorageError"
    assert "3 MiB free; at least 64 MiB" in line["message"]


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "storage"
    path.write_text("not a folder")
    with pytest.raises(StorageError, match=str(path)):
        check(EngineConfig(storage=path), limit_s=30)


def test_a_gpu_without_a_driver_is_refused_when_the_form_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "DRIVER", "libnothing.so.1")
    *_, line = looked(EngineConfig(storage=tmp_path))
    assert line == {"device": "the CPU (there is no NVIDIA driver (libnothing.so.1 cannot be loaded): install one, or "
                    "start the container with GPUs)"}  # fmt: skip
    *_, line = looked(EngineConfig(storage=tmp_path, device="cuda:1"))
    assert line["error"] == DeviceUnavailable.__name__
    assert line["message"].startswith("CUDA was asked for, but there is no NVIDIA driver")


def test_a_precision_that_the_machine_has_not_is_refused_when_the_form_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "DRIVER", "libnothing.so.1")
    *_, line = looked(EngineConfig(storage=tmp_path, precision="bf16"))
    assert line["error"] == InvalidConfig.__name__
    assert "choose int8 or fp32" in line["message"]


def test_without_a_compiler_the_check_says_who_misses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert {"compiler": "none (fused kernels need one)"} in looked(EngineConfig(storage=tmp_path))


def test_a_disk_that_hangs_is_an_error_within_the_limit(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"did not answer within 0\.3 seconds"):
        check(EngineConfig(storage=tmp_path), limit_s=0.3, command=a_look_that_writes(then="time.sleep(60)"))
    assert time.monotonic() - started < 30  # it was not waited for


def test_a_driver_that_hangs_is_none_because_it_may_only_be_waking_up(tmp_path: Path) -> None:
    slow = a_look_that_writes('{"storage": "fine"}', '{"compiler": "cc"}', then="time.sleep(60)")
    findings = check(EngineConfig(storage=tmp_path, device="cuda"), limit_s=2, command=slow)
    assert (findings.storage, findings.compiler) == ("fine", "cc")
    assert findings.device == "not found out within 2 seconds"


def test_half_a_line_counts_as_none(tmp_path: Path) -> None:
    cut = (sys.executable, "-S", "-c", 'import sys; sys.stdout.write(\'{"storage": "fine"}\\n{"comp\')')
    assert check(EngineConfig(storage=tmp_path), limit_s=30, command=cut).compiler.startswith("not found out")


def test_the_check_needs_the_standard_library_only(tmp_path: Path) -> None:
    """-S leaves site-packages out; a failing import would look like a storage folder that does not answer."""
    assert check(EngineConfig(storage=tmp_path), limit_s=30).storage.startswith(str(tmp_path))


def test_free_space_is_that_of_the_folders_disk(tmp_path: Path) -> None:
    assert abs(module.free_mib(tmp_path) - (shutil.disk_usage(tmp_path).free >> 20)) < 1024


def test_the_secret_of_the_form_is_in_no_command_line(tmp_path: Path) -> None:
    shown = tmp_path / "arguments"
    show = (sys.executable, "-S", "-c", f"import sys; open({os.fspath(shown)!r}, 'w').write(str(sys.argv))")
    settings = {"storage": str(tmp_path)} | ({"hub_token": "hf_secret"} if hasattr(EngineConfig, "hub_token") else {})
    with pytest.raises(StorageError):
        check(EngineConfig.from_mapping(settings), limit_s=30, command=show)
    assert str(tmp_path) in shown.read_text()
    assert "hf_secret" not in shown.read_text()


class FakeCuda:
    """libcuda.so.1 with two GPUs, as ctypes would call it; the second one cannot be opened."""

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13_000
        return 0

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, number: Any, index: int) -> int:
        number._obj.value = index
        return 0

    def cuDeviceGetName(self, text: Any, length: int, number: Any) -> int:
        text.value = b"NVIDIA L4"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, number: Any) -> int:
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, number: Any) -> int:
        return 2 if number.value else 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 20_000 << 20, 22_000 << 20
        return 0

    def cuGetErrorString(self, status: int, word: Any) -> int:
        word._obj.value = b"out of memory"
        return 0


@pytest.mark.parametrize("setting", ["auto", "cuda", "cuda:0"])
def test_a_gpu_is_described_by_its_driver_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCuda())
    *_, line = looked(EngineConfig(storage=tmp_path, device=setting))
    assert line == {"device": "cuda:0 NVIDIA L4, compute capability 8.9, 20000 of 22000 MiB free"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"device": "cuda:1"}, "cuda:1 cannot be used (cuDevicePrimaryCtxRetain: out of memory)"),
        ({"device": "cuda:2"}, "there is no cuda:2: this process sees 2 GPUs"),
        ({"device": "cuda", "gpu_memory": "21000"}, "20000 MiB free and 21000 MiB are needed"),
    ],
)
def test_a_gpu_that_cannot_be_had_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], reason: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCuda())
    *_, line = looked(EngineConfig.from_mapping(settings | {"storage": str(tmp_path)}))
    assert line["error"] == DeviceUnavailable.__name__
    assert reason in line["message"]
