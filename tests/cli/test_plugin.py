"""A plugin that was left has nobody left over."""

from __future__ import annotations

from pathlib import Path

from cli.machine import descendants
from cli.plugin import plugin

ROOT = Path(__file__).resolve().parents[2]


def test_when_the_plugin_is_left_its_engine_has_ended_too(tmp_path: Path) -> None:
    with plugin(ROOT, {"storage": str(tmp_path), "device": "cpu"}) as daemon:
        list(daemon.invoke_llm([{"role": "user", "content": "?"}], {"max_tokens": 1}))
        engines = [pid for pid in descendants(daemon.pid) if "engine.host" in _words(pid)]
    assert engines
    assert not [pid for pid in engines if _words(pid)]
    assert descendants(daemon.pid) == []


def _words(pid: int) -> list[str]:
    """The command line; none for a process that has ended, reaped or not."""
    file = Path(f"/proc/{pid}/cmdline")
    return file.read_text().split("\0")[:-1] if file.exists() else []
