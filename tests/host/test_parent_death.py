from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.host.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("patches", ["", "gevent"])
@pytest.mark.parametrize(
    "doing", ["silent", "endless", "spins", "holds-the-gil", "frees-the-gil", "start-slow", "start-holds-the-gil"]
)
def test_the_engine_is_gone_when_its_parent_was_killed(doing: str, patches: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.host.parent", doing, patches],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        engine = int(parent.stdout.readline())
        assert not is_gone(engine)
        parent.kill()
        eventually(lambda: is_gone(engine), "the engine outlived its parent")
