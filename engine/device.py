"""Where models run: what the settings ask for and what this machine has become GPUs, or the CPU and why.

The machine is asked from the cheap to the dear: the driver first, which needs no package; then torch and ONNX Runtime,
which take seconds to import; a GPU's memory last, which opens it. Importing this module costs nothing.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.config import EngineConfig, PrecisionSetting, require_cpu_precision
from engine.errors import DeviceUnavailable, InvalidConfig
from engine.spec import FloatType, ModelSpec, Precision

logger = logging.getLogger(__name__)

DRIVER = "libcuda.so.1"
DRIVER_CUDA = 13_000  # as cuDriverGetVersion counts: the CUDA that torch and ONNX Runtime are built with
# What onnxruntime-gpu 1.31 has machine code for; it carries none that a driver could translate for other GPUs.
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
BFLOAT16_CAPABILITY = (8, 0)
# What its CUDA provider is linked with, and the package that brings it.
LIBRARIES: Mapping[str, str] = {
    "libcublasLt.so.13": "nvidia-cublas",
    "libcublas.so.13": "nvidia-cublas",
    "libcurand.so.10": "nvidia-curand",
    "libcudart.so.13": "nvidia-cuda-runtime",
}
LEAST_FREE_MIB = 512  # the smallest model, its workspace and some KV
_MIB = 1 << 20
_LIBRARY = re.compile(r"lib[\w-]+\.so[\w.]*")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that models can run on. `free_bytes` is what was free when it was looked at."""

    index: int
    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        major, minor = self.capability
        memory = f"{self.free_bytes // _MIB} of {self.total_bytes // _MIB} MiB free"
        return f"cuda:{self.index} {self.name}, compute capability {major}.{minor}, {memory}"


@dataclass(frozen=True, slots=True)
class Devices:
    """`gpus` is empty for the CPU, and `reason` then says why `auto` came to that, in a sentence without its end."""

    gpus: tuple[Gpu, ...] = ()
    reason: str = ""


class Probe(Protocol):
    """What torch and ONNX Runtime know. `name`, `capability` and `memory` raise RuntimeError for a GPU that fails."""

    def torch_cuda(self) -> str | None:
        """The CUDA version that torch is built for; None for a torch without CUDA."""
        ...

    def available(self) -> bool: ...

    def count(self) -> int: ...

    def has_provider(self) -> bool:
        """Whether the installed ONNX Runtime is built with CUDA."""
        ...

    def missing(self, libraries: Sequence[str]) -> list[str]:
        """Those of the shared libraries that cannot be loaded."""
        ...

    def name(self, index: int) -> str: ...

    def capability(self, index: int) -> tuple[int, int]: ...

    def memory(self, index: int) -> tuple[int, int]:
        """Free and total bytes. Opens the GPU, which takes some hundred MiB of it."""
        ...


def driver_cuda() -> int | None:
    """The newest CUDA that the NVIDIA driver speaks, 13000 for 13.0; None where there is no driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def machine_probe() -> Probe:
    """This machine. Raises ImportError or OSError when torch or ONNX Runtime cannot be imported."""
    from engine.runtime.cuda.probe import MachineProbe

    return MachineProbe()


def resolve(
    config: EngineConfig,
    driver: Callable[[], int | None] = driver_cuda,
    machine: Callable[[], Probe] = machine_probe,
) -> Devices:
    """The devices to run on.

    `auto` takes the first GPU that works and else the CPU, which it logs once. Raises DeviceUnavailable, naming what is
    missing, when CUDA is asked for and cannot be had.
    """
    if config.device == "cpu":
        return Devices()
    try:
        return Devices(_chosen(config, driver, machine))
    except DeviceUnavailable as error:
        if config.device != "auto":
            raise _refusal(error) from error
        _log_once(f"models run on the CPU: {error}")
        return Devices(reason=str(error))


def check_driver(config: EngineConfig, driver: Callable[[], int | None] = driver_cuda) -> None:
    """The part of `resolve` that needs no package, for the form. Raises DeviceUnavailable as `resolve` does."""
    if config.device.startswith("cuda"):
        try:
            _require_driver(driver)
        except DeviceUnavailable as error:
            raise _refusal(error) from error


def installed_gpus(
    driver: Callable[[], int | None] = driver_cuda, machine: Callable[[], Probe] = machine_probe
) -> list[Gpu]:
    """Every GPU, whether models can run on it or not. Raises DeviceUnavailable where CUDA does not work at all."""
    probe = _working(driver, machine)
    return [_gpu(probe, index) for index in range(probe.count())]


def resolve_precision(
    config: EngineConfig, devices: Devices, dtype: FloatType, *, wide_activations: bool = False
) -> Precision:
    """What `auto` comes to: int8 on the CPU, where it is faster and smaller; on GPUs the checkpoint's 16-bit type.

    A float32 checkpoint becomes fp16, which keeps more of its digits than bf16, unless its activations are too large
    for that (`ModelSpec.wide_activations`). GPUs before Ampere have no bf16. Raises InvalidConfig for a precision that
    the devices do not have, or that does not hold the activations.
    """
    chosen = config.precision
    if not devices.gpus:
        require_cpu_precision(chosen, devices.reason)
        return "int8" if chosen == "auto" else chosen
    old = [gpu for gpu in devices.gpus if gpu.capability < BFLOAT16_CAPABILITY]
    if chosen == "bf16" and old:
        raise InvalidConfig(f"precision bf16 is not for {old[0].name}, which is too old; choose fp16 or int8")
    if wide_activations and chosen != "fp32":
        _require_bfloat16(chosen, old)
        return "bf16" if chosen == "auto" else chosen
    if chosen == "auto":
        return "bf16" if dtype == "bfloat16" and not old else "fp16"
    return chosen


def precision_for(config: EngineConfig, devices: Devices, spec: ModelSpec) -> Precision:
    """What a model runs in. Raises as `resolve_precision` does."""
    return resolve_precision(config, devices, spec.dtype, wide_activations=spec.wide_activations)


def require_wide(precision: PrecisionSetting) -> None:
    """That it holds activations larger than 65504. Raises InvalidConfig."""
    if precision == "fp16":
        raise InvalidConfig(
            "precision fp16 does not hold this model's activations, which become larger than 65504; choose bf16 or int8"
        )


def _require_bfloat16(chosen: PrecisionSetting, old: Sequence[Gpu]) -> None:
    require_wide(chosen)
    if old:
        raise InvalidConfig(
            f"this model's activations need bf16, and {old[0].name} is too old for it; choose another device"
        )


def memory_budget(config: EngineConfig, free_bytes: int) -> int:
    """Bytes of a GPU that weights, KV and workspace may take together, from what is free."""
    asked = config.gpu_memory
    return int(asked * free_bytes) if asked < 1 else int(asked) * _MIB


def _chosen(config: EngineConfig, driver: Callable[[], int | None], machine: Callable[[], Probe]) -> tuple[Gpu, ...]:
    probe = _working(driver, machine)
    if config.cuda_indices:
        return tuple(_usable(probe, index, config) for index in config.cuda_indices)
    problems = []
    for index in range(probe.count()):
        try:
            return (_usable(probe, index, config),)
        except DeviceUnavailable as error:
            problems.append(str(error))
    raise DeviceUnavailable("; ".join(problems))


def _refusal(error: DeviceUnavailable) -> DeviceUnavailable:
    return DeviceUnavailable(f"CUDA was asked for, but {error}")


def _require_driver(driver: Callable[[], int | None]) -> None:
    version = driver()
    if version is None:
        raise DeviceUnavailable(
            f"there is no NVIDIA driver ({DRIVER} cannot be loaded): install one, or start the container with GPUs"
        )
    if version < DRIVER_CUDA:
        raise DeviceUnavailable(
            f"the NVIDIA driver speaks CUDA {cuda_version(version)} and CUDA {cuda_version(DRIVER_CUDA)} is needed: "
            "update the driver"
        )


def _working(driver: Callable[[], int | None], machine: Callable[[], Probe]) -> Probe:
    _require_driver(driver)
    try:
        probe = machine()
    except (ImportError, OSError) as error:
        raise DeviceUnavailable(_import_problem(error)) from error
    if probe.torch_cuda() is None:
        raise DeviceUnavailable("the installed torch is built without CUDA: pip install the torch of requirements.txt")
    if not probe.has_provider():
        raise DeviceUnavailable(
            "the installed ONNX Runtime is built without CUDA: pip uninstall onnxruntime, then pip install "
            "--force-reinstall onnxruntime-gpu"
        )
    if missing := probe.missing(list(LIBRARIES)):
        raise DeviceUnavailable(_missing_library(missing[0]))
    if not probe.available() or not probe.count():
        raise DeviceUnavailable(
            "the NVIDIA driver shows this process no GPU: start the container with GPUs, "
            "and look at CUDA_VISIBLE_DEVICES"
        )
    return probe


def _import_problem(error: ImportError | OSError) -> str:
    library = _LIBRARY.search(str(error))
    if library and library[0] in LIBRARIES:
        return _missing_library(library[0])
    return f"torch or ONNX Runtime cannot be imported ({error}): pip install -r requirements.txt"


def _missing_library(library: str) -> str:
    return f"{library} is missing: pip install {LIBRARIES[library]}"


def _usable(probe: Probe, index: int, config: EngineConfig) -> Gpu:
    """Capability before memory, because asking for memory opens the GPU."""
    count = probe.count()
    if index >= count:
        raise DeviceUnavailable(f"there is no cuda:{index}: this process sees {count} GPUs, cuda:0 to cuda:{count - 1}")
    _require_capability(probe, index)
    gpu = _gpu(probe, index)
    free_mib = gpu.free_bytes // _MIB
    wanted = max(LEAST_FREE_MIB, 0 if config.gpu_memory < 1 else int(config.gpu_memory))
    if free_mib < wanted:
        raise DeviceUnavailable(
            f"cuda:{index} ({gpu.name}) has {free_mib} MiB free and {wanted} MiB are needed: "
            "end what else runs there, lower gpu_memory, or choose another GPU"
        )
    return gpu


def _require_capability(probe: Probe, index: int) -> None:
    capability = _asked(probe.capability, index)
    if capability not in CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        raise DeviceUnavailable(
            f"cuda:{index} ({_asked(probe.name, index)}) has compute capability {capability[0]}.{capability[1]}, and "
            f"ONNX Runtime is built for {known}: choose another GPU or the CPU"
        )


def _gpu(probe: Probe, index: int) -> Gpu:
    free, total = _asked(probe.memory, index)
    return Gpu(index, _asked(probe.name, index), _asked(probe.capability, index), free, total)


def _asked[Answer](question: Callable[[int], Answer], index: int) -> Answer:
    try:
        return question(index)
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise DeviceUnavailable(f"cuda:{index} cannot be used ({first}): see what nvidia-smi says about it") from error


def cuda_version(version: int) -> str:
    """13000 as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.cache
def _log_once(text: str) -> None:
    logger.warning(text)
