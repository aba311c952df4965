"""How much of the time a device computes, from a trace of its kernels (CUPTI, through torch.profiler)."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)
REQUEST, RESULT = "seconds", "trace.json"  # files of `serve_traces`
_LOOK_S = 0.1
_TOP = 12

Interval = tuple[str, float, float]  # what ran, from, to; seconds


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """`kernel_share` is the part of the wall time in which at least one kernel or copy ran; `top` the most expensive
    ones by name, with how often they ran and their seconds."""

    wall_s: float
    busy_s: float
    kernel_s: float  # more than busy_s where streams overlap
    kernels: int
    kernel_share: float
    top: list[tuple[str, int, float]]


def trace_kernels(work: Callable[[], object]) -> KernelTimes:
    """What the device does while `work` runs. Raises RuntimeError when nothing can be traced here.

    All threads of this process are seen, replayed graphs included; tracing makes launches slower, so times are taken
    without it.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device to trace")
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        started = time.perf_counter()
        work()
        wall_s = time.perf_counter() - started
    return kernel_times(_device_intervals(trace), wall_s)


def _device_intervals(trace: profile) -> list[Interval]:
    """The raw events: torch's own view of them takes minutes for a few hundred thousand kernels."""
    profiler: Any = trace.profiler
    events = profiler.kineto_results.events()
    return [(e.name(), e.start_ns() / 1e9, e.end_ns() / 1e9) for e in events if e.device_type() == DeviceType.CUDA]


def kernel_times(intervals: Iterable[Interval], wall_s: float) -> KernelTimes:
    ordered = sorted(intervals, key=lambda interval: interval[1])
    busy, end = 0.0, float("-inf")
    by_name: dict[str, tuple[int, float]] = {}
    for name, start, stop in ordered:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
        count, seconds = by_name.get(name, (0, 0.0))
        by_name[name] = count + 1, seconds + stop - start
    top = sorted(((name, *both) for name, both in by_name.items()), key=lambda one: -one[2])[:_TOP]
    total = sum(seconds for _, seconds in by_name.values())
    return KernelTimes(wall_s, busy, total, len(ordered), busy / wall_s if wall_s else 0.0, top)


def serve_traces(folder: Path) -> None:
    """Trace whenever a file `seconds` with a number appears in `folder`; the result is its `trace.json`.

    For measuring an engine that runs in another process (TESSERA_TRACE names the folder). Starts a thread.
    """
    threading.Thread(target=_serve, args=(folder,), name="engine-trace", daemon=True).start()


def _serve(folder: Path) -> None:
    while True:
        time.sleep(_LOOK_S)
        with suppress(FileNotFoundError, ValueError):
            seconds = float((folder / REQUEST).read_text())
            (folder / REQUEST).unlink()
            try:
                times = trace_kernels(lambda seconds=seconds: time.sleep(seconds))  # type: ignore[misc]
            except RuntimeError:  # no CUPTI, or another profiler has it
                log.exception("tracing failed")
                continue
            partial = folder / f".{RESULT}"
            partial.write_text(json.dumps(asdict(times)))
            partial.replace(folder / RESULT)
