"""The real plugin with the real engine and the demo model, as Dify's daemon runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.daemon import Daemon

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def daemon(storage: Path) -> Iterator[Daemon]:
    # heartbeats every 0.2 s instead of 10: the same greenlet, so a block of the process shows at once
    settings = {"storage": str(storage), "request_timeout_s": "60"}
    with Daemon(ROOT, env={"HEARTBEAT_INTERVAL": "0.2"}, credentials=settings) as running:
        yield running
