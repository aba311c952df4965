"""What a kernel launch takes as a tensor: any object with a shape, a type and an address."""

from __future__ import annotations

from typing import Protocol

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
