"""What the engine tells of its own work: plain records for `status`, `./tessera doctor` and the benches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.errors import EngineError
from engine.request import Finished


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one model. Times in seconds; `started_s` and `finished_s` are time.perf_counter() values.

    A step ends when its tokens are with their streams, so the distance between two `finished_s` is what a step takes,
    however much of the next one is prepared meanwhile.
    """

    model: str
    started_s: float  # scheduling began
    finished_s: float
    host_s: float  # the loop's thread worked: its turn without waiting for the device, which on a CPU it is itself
    decode_rows: int  # sequences that decoded
    context_tokens: int  # that these attended to, all together, the new tokens included
    prefill_tokens: int
    images: int  # that went to the encoder
    tokens_out: int  # sampled
    device_s: float | None = None  # by the device's events; None where it has none
    device: str = ""  # cpu, or cuda:0


OnStep = Callable[[StepRecord], None]


def both(first: OnStep | None, second: OnStep) -> OnStep:
    """Tell two of each step."""
    if first is None:
        return second

    def tell(record: StepRecord) -> None:
        first(record)
        second(record)

    return tell


class Counts(Protocol):
    """Who counts what happens to requests: engine.metrics.Metrics, where the words are explained, or nobody."""

    def ended(self, model: str, event: Finished | EngineError) -> None: ...

    def computed(self, model: str, finished: Finished) -> None: ...

    def looked_up(self, model: str, cache: str, *, found: bool) -> None: ...


class Uncounted:
    """Nobody."""

    def ended(self, model: str, event: Finished | EngineError) -> None:
        """Not counted."""

    def computed(self, model: str, finished: Finished) -> None:
        """Not counted."""

    def looked_up(self, model: str, cache: str, *, found: bool) -> None:
        """Not counted."""


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes that a loaded model occupies on its device, and what it takes of the host's memory."""

    weights: int
    kv: int  # reserved for keys and values
    kv_per_token: int
    workspace: int  # activations, bindings, captured graphs: what the device lost to loading beyond the other two
    host: int


def resident_bytes(pid: int | str = "self") -> int:
    """Memory of the host that a process has now."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) * 1024
