"""Scratch memory that all operators of a device share."""

from __future__ import annotations

import pytest
import torch

from engine.errors import DeviceOutOfMemory
from engine.kernels.workspace import ALIGNMENT, Workspace, bytes_of

CPU = torch.device("cpu")


def test_what_is_taken_lies_apart_aligned_and_contiguous() -> None:
    workspace = Workspace(bytes_of((3, torch.int8), (6, torch.float32), (2, torch.bfloat16)), CPU)
    taken = [
        workspace.take((3,), torch.int8), workspace.take((2, 3), torch.float32), workspace.take((2, 1), torch.bfloat16)
    ]  # fmt: skip
    starts = [tensor.data_ptr() - taken[0].data_ptr() for tensor in taken]
    assert starts == [0, ALIGNMENT, 2 * ALIGNMENT]
    assert [tuple(tensor.shape) for tensor in taken] == [(3,), (2, 3), (2, 1)]
    assert all(tensor.is_contiguous() for tensor in taken)


def test_what_a_scope_took_is_free_after_it_even_if_it_failed() -> None:
    workspace = Workspace(2 * ALIGNMENT, CPU)
    kept = workspace.take((1,), torch.int32)
    with pytest.raises(DeviceOutOfMemory), workspace.scope():
        workspace.take((2, ALIGNMENT), torch.int8)
    with workspace.scope():
        inner = workspace.take((1,), torch.int32)
    again = workspace.take((1,), torch.float16)
    assert again.data_ptr() == inner.data_ptr() == kept.data_ptr() + ALIGNMENT


def test_too_little_is_an_error_with_the_numbers_and_leaves_the_rest_usable() -> None:
    workspace = Workspace(1000, CPU)
    workspace.take((1,), torch.int8)
    with pytest.raises(DeviceOutOfMemory, match=r"torch.float32 \[200\] needs 1024 bytes .* 768 of 1024 are free"):
        workspace.take((200,), torch.float32)
    assert workspace.take((192,), torch.float32).shape == (192,)


def test_nothing_can_be_taken_of_an_empty_one() -> None:
    workspace = Workspace(0, CPU)
    assert workspace.take((0, 5), torch.float16).shape == (0, 5)
    with pytest.raises(DeviceOutOfMemory):
        workspace.take((1,), torch.int8)


def test_tickets_begin_at_zero() -> None:
    assert not Workspace(0, CPU).tickets.any()
