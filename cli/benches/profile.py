"""Kernel time over wall time, from a trace of steps that are not timed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cli.benches.in_process import StepLog, Work
from cli.benches.report import BenchError

STEPS = 32


def trace_steps(steps: StepLog, work: Sequence[Work]) -> dict[str, Any]:
    """The device's kernels during the next steps. Raises BenchError without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise BenchError("--profile traces kernels of a CUDA device; there is none")
    from engine.runtime.cuda.trace import trace_kernels

    def until_done() -> None:
        count = itertools.count(1)
        steps.wait(lambda _: next(count) >= STEPS, work, first=len(steps.records))
        torch.cuda.synchronize()

    started = time.perf_counter()
    times = trace_kernels(until_done)
    return asdict(times) | {"steps": STEPS, "traced_s": round(time.perf_counter() - started, 2)}
