"""A plugin process for a while, and the certainty that what it held is free again."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cli.daemon import Daemon
from cli.machine import descendants

GONE_S = 30.0  # a process gives gigabytes of GPU memory back
_POLL_S = 0.02

log = logging.getLogger(__name__)


@contextlib.contextmanager
def plugin(folder: Path, settings: Mapping[str, str], env: Mapping[str, str] | None = None) -> Iterator[Daemon]:
    """A ready daemon and its plugin; leaving kills it and waits until its engine's process has ended too.

    An engine takes a share of the memory that is free when it loads, so the next one must not find the last one's.
    Raises PluginCrashed when the plugin does not become ready.
    """
    family: list[int] = []
    try:
        with Daemon(folder, credentials=settings, env=env) as daemon:
            try:
                yield daemon
            finally:
                family = descendants(daemon.pid)
    finally:
        _wait_gone(family)


def _wait_gone(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + GONE_S
    for pid in pids:
        while _runs(pid):
            if time.monotonic() > deadline:
                log.warning("process %d still runs after its plugin ended", pid)
                return
            time.sleep(_POLL_S)


def _runs(pid: int) -> bool:
    """A zombie has given back what it had."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
