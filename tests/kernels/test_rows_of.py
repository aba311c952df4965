"""Some rows of a tensor, wherever it lies."""

from __future__ import annotations

import torch

from engine.kernels.bridge.tensors import DeviceTensor, rows_of


def test_rows_on_a_device_and_on_the_host_are_at_the_same_place() -> None:
    for dtype in (torch.float16, torch.int8, torch.float32):
        whole = torch.zeros((10, 4), dtype=dtype)
        found = rows_of(DeviceTensor(whole.data_ptr(), (10, 4), dtype), 2, 5)
        wanted = rows_of(whole, 2, 5)
        assert (found.data_ptr(), found.shape, found.dtype) == (wanted.data_ptr(), (3, 4), dtype)
