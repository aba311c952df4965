"""What this machine has for these settings, and what is wrong with it: asked when a form is saved.

A driver or a network disk may take for ever, so the looking is an errand. It asks the driver itself, because torch and
ONNX Runtime take too long to import.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import device, errand
from engine.config import EngineConfig
from engine.errors import StorageError
from engine.storage import open_storage

LIMIT_S = 1.7  # the form's user waits; Dify's own work comes on top
FREE_SPACE_MIB = 64  # the bundled model's artifact and a few answers
COMPILERS = ("cc", "gcc", "clang")  # as engine/kernels/bridge/shim.py looks for them
_SECRETS = ("hub_token",)  # nothing here needs them
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True, slots=True)
class Findings:
    """In words, for a log line; `device` may say that it was not found out in time."""

    storage: str
    compiler: str
    device: str

    def __str__(self) -> str:
        return f"storage: {self.storage}; compiler: {self.compiler}; device: {self.device}"


def check(config: EngineConfig, *, limit_s: float = LIMIT_S, command: Sequence[str] | None = None) -> Findings:
    """Look at storage, compiler and GPUs for at most `limit_s` seconds. `command` replaces who looks (tests).

    Raises StorageError, DeviceUnavailable or InvalidConfig, naming what to change. A GPU that does not answer in time
    is no error, because drivers may take seconds to wake up: the first request will tell.
    """
    settings = {name: value for name, value in config.to_mapping().items() if name not in _SECRETS}
    found: dict[str, str] = {}
    for line in errand.ask("engine.check", json.dumps(settings), limit_s, packages=False, command=command):
        found |= line
    if "storage" not in found:
        raise StorageError(
            f"{config.storage} did not answer within {limit_s:g} seconds; look at its disk, or name a storage folder on"
            " another one"
        )
    unknown = f"not found out within {limit_s:g} seconds"
    return Findings(found["storage"], found.get("compiler", unknown), found.get("device", unknown))


def look(settings: str, write: errand.Write) -> None:
    """What the process does. Storage comes first, so that it can be told apart from a slow driver.

    Raises StorageError, DeviceUnavailable or InvalidConfig.
    """
    config = EngineConfig.from_mapping(json.loads(settings))
    write({"storage": _storage(config.storage)})
    write({"compiler": _compiler() or "none (fused kernels need one)"})
    write({"device": _device(config)})


def _storage(folder: Path) -> str:
    """Raises StorageError."""
    open_storage(folder)
    free = free_mib(folder)
    if free < FREE_SPACE_MIB:
        raise StorageError(
            f"{folder} has {free} MiB free; at least {FREE_SPACE_MIB} MiB are needed: "
            "free some, or name a storage folder on another disk"
        )
    return f"{folder}, {free} MiB free"


def free_mib(folder: Path) -> int:
    """Space left for this user, in MiB."""
    return shutil.disk_usage(folder).free >> 20


def _compiler() -> str | None:
    return os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)


def _device(config: EngineConfig) -> str:
    """Raises DeviceUnavailable or InvalidConfig for a GPU or a precision that cannot be had."""
    devices = device.resolve(config, machine=_Driver)
    device.resolve_precision(config, devices, "float32")
    if devices.gpus:
        return ", ".join(map(str, devices.gpus))
    return f"the CPU ({devices.reason})" if devices.reason else "the CPU"


class _Driver:
    """engine.device.Probe of the NVIDIA driver alone. What only packages know counts as there."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL(device.DRIVER)
        self._start: int = self._cuda.cuInit(0)

    def torch_cuda(self) -> str | None:
        return device.cuda_version(device.DRIVER_CUDA)

    def has_provider(self) -> bool:
        return True

    def missing(self, libraries: Sequence[str]) -> list[str]:  # noqa: ARG002 - the protocol's signature
        return []

    def available(self) -> bool:
        return self._start == 0

    def count(self) -> int:
        count = ctypes.c_int(0)
        return count.value if self._cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0

    def name(self, index: int) -> str:
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device(index))
        return text.value.decode(errors="replace")

    def capability(self, index: int) -> tuple[int, int]:
        return self._attribute(index, _CAPABILITY_MAJOR), self._attribute(index, _CAPABILITY_MINOR)

    def memory(self, index: int) -> tuple[int, int]:
        """Opens the GPU, which this process gives back when it ends, a moment later."""
        context, free, total = ctypes.c_void_p(), ctypes.c_size_t(0), ctypes.c_size_t(0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device(index))
        self._call("cuCtxSetCurrent", context)
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _device(self, index: int) -> ctypes.c_int:
        number = ctypes.c_int(0)
        self._call("cuDeviceGet", ctypes.byref(number), index)
        return number

    def _attribute(self, index: int, attribute: int) -> int:
        value = ctypes.c_int(0)
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device(index))
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        """Raises RuntimeError with CUDA's own word for what went wrong."""
        status: int = getattr(self._cuda, function)(*arguments)
        if status:
            word = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(word))
            raise RuntimeError(f"{function}: {(word.value or b'unknown error').decode()}")


if __name__ == "__main__":
    errand.answer(look)
