"""Every test here leaves no process and no descriptor behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.client import EngineClient
from engine.config import EngineConfig
from tests.host.fake_engine import COMMAND
from tests.host.waiting import eventually


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    me = psutil.Process()
    children, descriptors = set(me.children(recursive=True)), me.num_fds()
    yield
    eventually(lambda: set(me.children(recursive=True)) <= children, "a process was left behind")
    eventually(lambda: me.num_fds() <= descriptors, "a descriptor was left open")


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(storage=tmp_path)


@pytest.fixture
def client(config: EngineConfig, _no_leaks: None) -> Iterator[EngineClient]:
    client = EngineClient(config, command=COMMAND)
    yield client
    client.close()
