"""Kernel time over wall time, from a trace of work that is not timed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from cli.benches.in_process import StepLog, Work
from cli.benches.report import BenchError

STEPS = 32


def trace_steps(steps: StepLog, work: Sequence[Work]) -> dict[str, Any]:
    """The device's kernels during the next steps. Raises BenchError without a CUDA device."""

    def next_steps() -> None:
        count = itertools.count(1)
        steps.wait(lambda _: next(count) >= STEPS, work, first=len(steps.records))

    return trace_work(next_steps) | {"steps": STEPS}


def trace_work(work: Callable[[], object]) -> dict[str, Any]:
    """The device's kernels from the beginning of `work` until all that it enqueued is done. Raises BenchError."""
    import torch

    if not torch.cuda.is_available():
        raise BenchError("--profile traces kernels of a CUDA device; there is none")
    from engine.runtime.cuda.trace import trace_kernels

    def until_done() -> None:
        work()
        torch.cuda.synchronize()

    started = time.perf_counter()
    times = trace_kernels(until_done)
    return asdict(times) | {"traced_s": round(time.perf_counter() - started, 2)}
