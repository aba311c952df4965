"""What a kernel launch takes as a tensor: any object with a shape, a type and an address."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Tensor(Protocol):
    """Row-major memory without gaps. A torch.Tensor is one; so is a record of an address in ONNX Runtime's memory.

    Triton reads `dtype` and `data_ptr()` alone; its interpreter needs a torch.Tensor.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def data_ptr(self) -> int: ...


class Tiled(NamedTuple):
    """A matrix of which a kernel has the device's copy engine bring tiles of `block_shape`; zeros lie around it.

    Has what Triton's launcher reads of a TensorDescriptor (triton/tools/tensor_descriptor.py), which takes as long to
    make as a launch. `base` begins at a multiple of 16 bytes, and so do its rows.
    """

    base: Tensor
    shape: tuple[int, int]
    strides: tuple[int, int]
    block_shape: list[int]
    padding: str = "zero"

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype
