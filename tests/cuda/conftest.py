"""Engines on devices that are not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.engine import Engine
from engine.runners.open_cuda import _take_over
from tests.cuda.fake_device import FakeGpu
from tests.cuda.one_operator import DEVICE
from tests.engine.conftest import Start, start, storage

__all__ = ["start", "storage"]

StartOnGpu = Callable[..., Engine]


@pytest.fixture
def own_stream() -> None:
    """Of a real device: this thread's work gets a stream, as an engine's loop has one."""
    _take_over(DEVICE)


@pytest.fixture
def on_gpu(start: Start, monkeypatch: pytest.MonkeyPatch) -> StartOnGpu:
    """Start an engine on a fake device, in fp32: what differs from the CPU is the order of sums."""

    def started(fake: FakeGpu | None = None, **settings: Any) -> Engine:
        fake = fake or FakeGpu()
        monkeypatch.setattr("engine.engine.resolve", fake.devices)
        monkeypatch.setattr("engine.runners.open_cuda.open_cuda", fake.open)
        return start(**{"device": "cuda", "precision": "fp32", "max_batch_size": 8} | settings)

    return started
