"""How long a launch takes inside a captured CUDA graph, its weights fetched from memory and not from a cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Protocol

import torch
from triton import TritonError

from cli.benches.report import BenchError

Launch = Callable[[int], object]
"""Launches on the current stream; the number says which copy of its weights it reads."""

LAUNCHES = 48  # of a graph, at least: its own start is spread over them
MOST_COPIES = 256
REPLAYS = 11
WARM_UP = 3


class Timer(Protocol):
    def __call__(self, launch: Launch, copies: int) -> float:
        """Seconds of one launch. Raises BenchError for one that does not run."""
        ...


class GraphTimer:
    """The median of several replays of a graph that launches over and over, with one copy after the other.

    Between two launches of a graph the device takes about a microsecond, which is in the time, as it is in a step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, launch: Launch, copies: int) -> float:
        try:
            with torch.cuda.device(self._device):
                return self._measure(launch, copies)
        except (TritonError, torch.OutOfMemoryError) as error:
            raise BenchError(f"{type(error).__name__}: {error}") from error

    def _measure(self, launch: Launch, copies: int) -> float:
        for number in range(copies):  # compiled, and scratch memory taken
            launch(number)
        torch.cuda.synchronize()
        graph, rounds = torch.cuda.CUDAGraph(), -(-LAUNCHES // copies)
        with torch.cuda.graph(graph):
            for number in range(rounds * copies):
                launch(number % copies)
        times = [_replay(graph) for _ in range(WARM_UP + REPLAYS)][WARM_UP:]
        return statistics.median(times) / (rounds * copies)


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3  # from milliseconds


def copies_of(nbytes: int, cache_bytes: int) -> int:
    """So many that none is left of a copy of `nbytes` in a cache when its turn comes again."""
    return min(MOST_COPIES, 1 + -(-2 * cache_bytes // nbytes))
