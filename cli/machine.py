"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("onnxruntime-gpu", "transformers", "numpy", "dify_plugin")


def card() -> dict[str, str]:
    """Chip, cores, and the versions of what does the work."""
    facts = {"chip": _chip(), "cores": str(len(os.sched_getaffinity(0))), "python": platform.python_version()}
    return facts | {name: version(name) for name in PACKAGES}


def peak_memory(pid: int) -> dict[str, int]:
    """Peak resident MiB of a process and of each of its descendants, under the names of their modules."""
    peaks: dict[str, int] = {}
    for process in [pid, *_descendants(pid)]:
        status = Path(f"/proc/{process}/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        name = words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name
        peaks[name] = peaks.get(name, 0) + peak // 1024
    return peaks


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def _chip() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
