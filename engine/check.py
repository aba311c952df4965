"""What this machine has for these settings, and what is wrong with it: asked when a form is saved.

A driver or a network disk may take for ever, so the looking is done by a short-lived process of its own that needs the
standard library only: `python -m engine.check SETTINGS` takes JSON and writes a line of JSON for everything it has
found out. It asks the driver itself, because torch and ONNX Runtime take too long to import.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import device
from engine.config import EngineConfig
from engine.errors import EngineError, StorageError, error_from_code
from engine.storage import open_storage

LIMIT_S = 1.7  # the form's user waits; Dify's own work comes on top
FREE_SPACE_MIB = 64  # the bundled model's artifact and a few answers
COMPILERS = ("cc", "gcc", "clang")  # as engine/kernels/bridge/shim.py looks for them
_ROOT = Path(__file__).resolve().parent.parent
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
    found: dict[str, str] = {}
    for line in _look(config, limit_s, command or (sys.executable, "-S", "-m", "engine.check")):
        if "error" in line:
            raise error_from_code(line["error"], line["message"])
        found |= line
    if "storage" not in found:
        raise StorageError(
            f"{config.storage} did not answer within {limit_s:g} seconds; look at its disk, or name a storage folder on"
            " another one"
        )
    unknown = f"not found out within {limit_s:g} seconds"
    return Findings(found["storage"], found.get("compiler", unknown), found.get("device", unknown))


def _look(config: EngineConfig, limit_s: float, command: Sequence[str]) -> list[dict[str, str]]:
    """What the process wrote until its time was over.

    It writes to a file: what is in a pipe when the time is over, gevent's `subprocess` throws away.
    """
    settings = {name: value for name, value in config.to_mapping().items() if name not in _SECRETS}
    with tempfile.TemporaryFile() as written:
        process = subprocess.Popen(
            [*command, json.dumps(settings)],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()  # not waited for: a process that hangs in the kernel ends when the kernel lets it
        written.seek(0)
        return [json.loads(line) for line in written if line.endswith(b"\n")]


def main(config: EngineConfig, write: Callable[[dict[str, str]], None]) -> None:
    """Storage first, so that it can be told apart from a slow driver."""
    looks: dict[str, Callable[[], str]] = {
        "storage": lambda: _storage(config.storage),
        "compiler": lambda: _compiler() or "none (fused kernels need one)",
        "device": lambda: _device(config),
    }
    for name, look in looks.items():
        try:
            write({name: look()})
        except EngineError as error:
            write({"error": error.code, "message": str(error)})
            return


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

    def _write(line: dict[str, str]) -> None:
        print(json.dumps(line), flush=True)

    main(EngineConfig.from_mapping(json.loads(sys.argv[1])), _write)
