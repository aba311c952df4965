"""Which device is chosen, and what is said when the one that was asked for cannot be had, on fake machines."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import device
from engine.config import EngineConfig, PrecisionSetting
from engine.device import Devices, Gpu, Probe, memory_budget, precision_for, resolve, resolve_precision
from engine.errors import DeviceUnavailable, InvalidConfig
from engine.spec import FloatType

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
H100 = Gpu(0, "H100", (9, 0), 70 * GIB, 80 * GIB)
OLD = Gpu(0, "GTX 1080", (6, 1), 7 * GIB, 8 * GIB)
T4 = Gpu(0, "T4", (7, 5), 15 * GIB, 16 * GIB)
FULL = Gpu(0, "L4", (8, 9), 300 << 20, 24 * GIB)


@dataclass
class FakeMachine(Probe):
    """A machine with these GPUs, in order; `broken` ones raise, `opened` are those whose memory was asked for."""

    gpus: Sequence[Gpu] = (H100,)
    driver: int | None = 13_000
    cuda: str | None = "13.0"
    provider: bool = True
    lacks: Sequence[str] = ()
    works: bool = True
    broken: Sequence[int] = ()
    import_error: Exception | None = None
    opened: list[int] = field(default_factory=list)
    imported: bool = False

    def torch_cuda(self) -> str | None:
        return self.cuda

    def available(self) -> bool:
        return self.works

    def count(self) -> int:
        return len(self.gpus)

    def has_provider(self) -> bool:
        return self.provider

    def missing(self, libraries: Sequence[str]) -> list[str]:
        return [library for library in libraries if library in self.lacks]

    def name(self, index: int) -> str:
        return self.gpus[index].name

    def capability(self, index: int) -> tuple[int, int]:
        return self.gpus[index].capability

    def memory(self, index: int) -> tuple[int, int]:
        self.opened.append(index)
        if index in self.broken:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nand much more")
        return self.gpus[index].free_bytes, self.gpus[index].total_bytes

    def import_packages(self) -> Probe:
        self.imported = True
        if self.import_error:
            raise self.import_error
        return self

    def resolve(self, setting: str, **settings: object) -> Devices:
        config = EngineConfig.from_mapping({"device": setting, **settings})
        return resolve(config, lambda: self.driver, self.import_packages)


UNUSABLE = {
    "no driver": (FakeMachine(driver=None), "there is no NVIDIA driver (libcuda.so.1 cannot be loaded)"),
    "old driver": (FakeMachine(driver=12_040), "the NVIDIA driver speaks CUDA 12.4 and CUDA 13.0 is needed"),
    "no torch": (
        FakeMachine(import_error=ModuleNotFoundError("No module named 'torch'")),
        "torch or ONNX Runtime cannot be imported (No module named 'torch'): pip install -r requirements.txt",
    ),
    "torch lacks a library": (
        FakeMachine(import_error=OSError("libcublas.so.13: cannot open shared object file: No such file")),
        "libcublas.so.13 is missing: pip install nvidia-cublas",
    ),
    "torch for the CPU": (FakeMachine(cuda=None), "torch is built without CUDA"),
    "onnxruntime for the CPU": (FakeMachine(provider=False), "ONNX Runtime is built without CUDA"),
    "no cublasLt": (
        FakeMachine(lacks=["libcublasLt.so.13"]),
        "libcublasLt.so.13 is missing: pip install nvidia-cublas",
    ),
    "no curand": (FakeMachine(lacks=["libcurand.so.10"]), "libcurand.so.10 is missing: pip install nvidia-curand"),
    "not available": (FakeMachine(works=False), "shows this process no GPU"),
    "no GPU": (FakeMachine(gpus=()), "shows this process no GPU"),
    "old GPU": (
        FakeMachine(gpus=[OLD]),
        "cuda:0 (GTX 1080) has compute capability 6.1, and ONNX Runtime is built for 7.5, 8.0, 8.6, 8.9, 9.0, 12.0",
    ),
    "full GPU": (FakeMachine(gpus=[FULL]), "cuda:0 (L4) has 300 MiB free and 512 MiB are needed"),
    "busy GPU": (FakeMachine(broken=[0]), "cuda:0 cannot be used (CUDA error: all CUDA-capable devices are busy)"),
}
unusable = pytest.mark.parametrize(("machine", "why"), UNUSABLE.values(), ids=UNUSABLE.keys())


@unusable
@pytest.mark.parametrize("setting", ["cuda", "cuda:0"])
def test_cuda_that_was_asked_for_and_cannot_be_had_is_an_error_that_says_why(
    machine: FakeMachine, why: str, setting: str
) -> None:
    with pytest.raises(DeviceUnavailable) as raised:
        machine.resolve(setting)
    assert str(raised.value).startswith("CUDA was asked for, but ")
    assert why in str(raised.value)


@unusable
def test_auto_falls_back_to_the_cpu_with_the_same_reason(machine: FakeMachine, why: str) -> None:
    devices = machine.resolve("auto")
    assert devices.gpus == ()
    assert why in devices.reason


@unusable
def test_the_cpu_asks_the_machine_nothing(machine: FakeMachine, why: str) -> None:
    fresh = dataclasses.replace(machine, imported=False)
    assert fresh.resolve("cpu") == Devices()
    assert not fresh.imported


@pytest.mark.parametrize("driver", [None, 12_090])
def test_without_a_driver_no_package_is_imported(driver: int | None) -> None:
    machine = FakeMachine(driver=driver)
    assert machine.resolve("auto").reason
    assert not machine.imported


def test_falling_back_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    device._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, device.__name__):
        for _ in range(3):
            FakeMachine(driver=None).resolve("auto")
    assert [record.getMessage() for record in caplog.records] == [
        "models run on the CPU: there is no NVIDIA driver (libcuda.so.1 cannot be loaded): "
        "install one, or start the container with GPUs"
    ]


@pytest.mark.parametrize("setting", ["auto", "cuda"])
def test_an_open_choice_is_the_first_gpu_that_works(setting: str) -> None:
    machine = FakeMachine(gpus=[OLD, FULL, H100, T4])
    devices = machine.resolve(setting)
    assert devices == Devices((dataclasses.replace(H100, index=2),))
    assert machine.opened == [1, 2], "a GPU that cannot run models is not opened, nor one that is not needed"


def test_where_no_gpu_works_each_says_why() -> None:
    reason = FakeMachine(gpus=[OLD, FULL]).resolve("auto").reason
    assert "cuda:0 (GTX 1080) has compute capability" in reason
    assert "; cuda:1 (L4) has 300 MiB free" in reason


def test_gpus_are_taken_by_number_in_that_order() -> None:
    machine = FakeMachine(gpus=[H100, OLD, T4])
    assert [gpu.name for gpu in machine.resolve("cuda:2,0").gpus] == ["T4", "H100"]
    assert machine.opened == [2, 0]


@pytest.mark.parametrize(
    ("setting", "why"),
    [("cuda:0,3", "there is no cuda:3: this process sees 3 GPUs, cuda:0 to cuda:2"), ("cuda:0,1", "(GTX 1080)")],
)
def test_every_gpu_that_is_numbered_must_work(setting: str, why: str) -> None:
    with pytest.raises(DeviceUnavailable, match="CUDA was asked for") as raised:
        FakeMachine(gpus=[H100, OLD, T4]).resolve(setting)
    assert why in str(raised.value)


def test_memory_that_was_asked_for_in_mebibytes_must_be_free() -> None:
    machine = FakeMachine(gpus=[dataclasses.replace(H100, free_bytes=1000 << 20)])
    assert machine.resolve("cuda", gpu_memory="1000").gpus
    with pytest.raises(DeviceUnavailable, match=r"has 1000 MiB free and 1001 MiB are needed: .*lower gpu_memory"):
        machine.resolve("cuda", gpu_memory="1001")


def test_a_budget_is_a_share_of_what_is_free_or_what_is_said() -> None:
    assert memory_budget(EngineConfig(gpu_memory=0.5), 10 * GIB) == 5 * GIB
    assert memory_budget(EngineConfig(gpu_memory=2048), 10 * GIB) == 2 * GIB


@pytest.mark.parametrize("version", [None, 12_040])
def test_the_forms_check_looks_at_the_driver_only_where_cuda_is_asked_for(version: int | None) -> None:
    for setting in ("auto", "cpu"):
        device.check_driver(EngineConfig(device=setting), lambda: version)
    with pytest.raises(DeviceUnavailable, match="CUDA was asked for, but the"):
        device.check_driver(EngineConfig(device="cuda"), lambda: version)
    device.check_driver(EngineConfig(device="cuda"), lambda: 13_010)


def test_every_gpu_is_listed_whether_it_can_be_used_or_not() -> None:
    machine = FakeMachine(gpus=[OLD, FULL])
    listed = device.installed_gpus(lambda: 13_000, machine.import_packages)
    assert [str(gpu) for gpu in listed] == [
        "cuda:0 GTX 1080, compute capability 6.1, 7168 of 8192 MiB free",
        "cuda:1 L4, compute capability 8.9, 300 of 24576 MiB free",
    ]


@pytest.mark.parametrize(
    ("asked", "gpus", "dtype", "precision"),
    [
        ("auto", (), "bfloat16", "int8"),
        ("int8", (), "float16", "int8"),
        ("fp32", (), "float16", "fp32"),
        ("auto", (H100,), "bfloat16", "bf16"),
        ("auto", (H100,), "float16", "fp16"),
        ("auto", (H100,), "float32", "fp16"),
        ("auto", (H100, T4), "bfloat16", "fp16"),
        ("int8", (H100,), "float16", "int8"),
        ("fp16", (H100,), "bfloat16", "fp16"),
        ("bf16", (H100,), "float16", "bf16"),
        ("fp32", (T4,), "float16", "fp32"),
    ],
)
def test_automatic_precision_is_int8_on_the_cpu_and_sixteen_bits_on_gpus(
    asked: PrecisionSetting, gpus: tuple[Gpu, ...], dtype: FloatType, precision: str
) -> None:
    assert resolve_precision(EngineConfig(precision=asked), Devices(gpus), dtype) == precision


def test_sixteen_bits_on_the_cpu_are_refused_with_why_it_is_the_cpu() -> None:
    config = EngineConfig(precision="fp16")
    with pytest.raises(InvalidConfig, match="fp16 needs a CUDA device, and there is no driver; choose int8 or fp32"):
        resolve_precision(config, Devices(reason="there is no driver"), "float16")


def test_bfloat16_on_a_gpu_without_it_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="bf16 is not for T4, which is too old; choose fp16 or int8"):
        resolve_precision(EngineConfig(precision="bf16"), Devices((H100, T4)), "bfloat16")


@pytest.mark.parametrize(
    ("asked", "gpus", "precision"),
    [("auto", (H100,), "bf16"), ("int8", (H100,), "int8"), ("bf16", (H100,), "bf16"), ("auto", (), "int8"),
     ("fp32", (T4,), "fp32")],
)  # fmt: skip
def test_activations_too_large_for_float16_get_bfloat16(
    asked: PrecisionSetting, gpus: tuple[Gpu, ...], precision: str
) -> None:
    config = EngineConfig(precision=asked)
    spec: Any = SimpleNamespace(dtype="float16", wide_activations=True)
    assert precision_for(config, Devices(gpus), spec) == precision


def test_float16_is_refused_where_it_does_not_hold_the_activations() -> None:
    config = EngineConfig(precision="fp16")
    with pytest.raises(InvalidConfig, match=r"fp16 does not hold this model's activations.*choose bf16 or int8"):
        resolve_precision(config, Devices((H100,)), "bfloat16", wide_activations=True)
    for chosen in ("auto", "int8"):
        with pytest.raises(InvalidConfig, match="need bf16, and T4 is too old"):
            resolve_precision(EngineConfig(precision=chosen), Devices((H100, T4)), "bfloat16", wide_activations=True)


def test_this_machines_packages_bring_every_library_that_cuda_needs() -> None:
    probe = device.machine_probe()
    assert probe.torch_cuda()
    assert probe.has_provider()
    assert probe.missing([*device.LIBRARIES, "libnothing.so.1"]) == ["libnothing.so.1"]


@pytest.mark.parametrize("arguments", ['device="cpu"', 'device="auto"'])
def test_choosing_the_cpu_imports_neither_torch_nor_onnxruntime(arguments: str) -> None:
    code = (
        "import sys; from engine import device; from engine.config import EngineConfig; "
        f"device.DRIVER = 'libnothing.so.1'; assert not device.resolve(EngineConfig({arguments})).gpus; "
        "print({'torch', 'onnxruntime', 'numpy'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
