"""What torch and ONNX Runtime raise when a device fails, as the engine's own errors."""

from __future__ import annotations

import re
from types import TracebackType

import torch

from engine.errors import DeviceLost, DeviceOutOfMemory, EngineError

# Both libraries quote cudaGetErrorString; ONNX Runtime's arena and cuBLAS have words of their own.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate memory|smaller than requested bytes|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)
# Errors after which "the process must be terminated and relaunched" (CUDA Runtime API, enum cudaError), and GPUs that
# went away.
_LOST = re.compile(
    r"illegal memory access|unspecified launch failure|misaligned address|illegal instruction|device-side assert"
    r"|hardware stack error|invalid program counter|operation not supported on global/shared address space"
    r"|launch timed out|uncorrectable (ECC|NVLink) error|no CUDA-capable device|busy or unavailable"
    r"|an exception occurred on the device|CUDA failure 999",
    re.IGNORECASE,
)


class DeviceFailures:
    """A context: raises DeviceOutOfMemory and DeviceLost for what stands behind an exception; others pass unchanged.

    May be entered again and again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, EngineError):
            return
        first = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)):
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # ONNX Runtime may need what torch keeps, and other processes too
            raise DeviceOutOfMemory(
                f"{self._device} ran out of memory; ask for less at a time, leave more free with a lower gpu_memory,"
                f" or end what else runs there ({first})"
            ) from error
        if _LOST.search(str(error)):
            raise DeviceLost(f"{self._device} failed and needs a new start; try again ({first})") from error
