"""Memory of ONNX Runtime as something that kernels are launched on."""

from __future__ import annotations

import ctypes
import math

import torch

from engine.kernels.pointer import Tensor

# ONNX's numbers; ONNXTensorElementDataType has the same.
ELEMENT_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.float16: 10,
    torch.bfloat16: 16,
}
_WRITABLE = 0x200  # PyBUF_WRITE

_memory_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


class DeviceTensor:
    """A pointer into a GPU's memory with its shape: all that a launch needs, made in a fraction of a microsecond."""

    __slots__ = ("_address", "dtype", "shape")

    def __init__(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._address = address
        self.shape = shape
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self._address

    def __repr__(self) -> str:
        return f"DeviceTensor({self._address:#x}, {self.shape}, {self.dtype})"


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor [rows, width], in its memory."""
    if isinstance(tensor, torch.Tensor):
        return tensor[start:stop]
    width = tensor.shape[1]
    address = tensor.data_ptr() + start * width * tensor.dtype.itemsize
    return DeviceTensor(address, (stop - start, width), tensor.dtype)


def host_tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A torch tensor over host memory that somebody else owns."""
    elements = math.prod(shape)
    if not elements:
        return torch.empty(shape, dtype=dtype)
    memory = _memory_view(address, elements * dtype.itemsize, _WRITABLE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
