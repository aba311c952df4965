"""What torch and ONNX Runtime know about this machine's GPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import onnxruntime as ort  # type: ignore[import-untyped]
import torch  # loads CUDA's libraries from its own packages, where ONNX Runtime then finds them


class MachineProbe:
    """engine.device.Probe of this machine."""

    def torch_cuda(self) -> str | None:
        return torch.version.cuda

    def available(self) -> bool:
        return torch.cuda.is_available()

    def count(self) -> int:
        return torch.cuda.device_count()

    def has_provider(self) -> bool:
        return "CUDAExecutionProvider" in ort.get_available_providers()

    def missing(self, libraries: Sequence[str]) -> list[str]:
        return [library for library in libraries if not _loads(library)]

    def name(self, index: int) -> str:
        return torch.cuda.get_device_name(index)

    def capability(self, index: int) -> tuple[int, int]:
        return torch.cuda.get_device_capability(index)

    def memory(self, index: int) -> tuple[int, int]:
        return torch.cuda.mem_get_info(index)


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
