"""What a measurement ran on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine.stats import resident_bytes

PACKAGES = ("onnxruntime-gpu", "torch", "triton", "transformers", "numpy", "dify_plugin")


def card() -> dict[str, str]:
    """Chips, cores, and the versions of what does the work."""
    facts = {"chip": _chip(), "cores": str(len(os.sched_getaffinity(0))), "python": platform.python_version()}
    if names := _query_gpus("name"):
        driver = (_query_gpus("driver_version") or ["?"])[0]
        facts |= {"gpu": ", ".join(names), "driver": driver}
    return facts | {name: found for name in PACKAGES if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_memory(pid: int) -> dict[str, int]:
    """Peak resident MiB of a process and of each of its descendants, under the names of their modules."""
    peaks: dict[str, int] = {}
    for process in [pid, *descendants(pid)]:
        status = Path(f"/proc/{process}/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        name = words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name
        peaks[name] = peaks.get(name, 0) + peak // 1024
    return peaks


def resident_mib(pid: int | str = "self") -> int:
    """Resident memory of a process now."""
    return resident_bytes(pid) >> 20


def gpu_mib() -> list[int] | None:
    """Memory in use on each GPU, by all processes; None without a driver."""
    rows = _query_gpus("memory.used")
    return None if rows is None else [int(row) for row in rows]


def _query_gpus(field: str) -> list[str] | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[:-1]


def descendants(pid: int) -> list[int]:
    """The processes that a process and its children started; none when it is gone."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it, or a task of it, ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def _chip() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
