"""`bench soak`: many mixed streams for minutes, in an engine's own process; what must not happen is counted.

Every stream must end exactly once, with as many tokens as its usage says; the process must be the same at the end,
idle, and no larger than it was after its first minute.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cli.benches import options
from cli.benches.decode import MIXED
from cli.benches.in_process import busy, decoder_spec, ensure_model, kv_mib, storage_folder
from cli.benches.report import Report, Row
from cli.machine import gpu_mib, resident_mib
from cli.memory import client_memory
from cli.settings import settings_from
from cli.traffic import Size, traffic
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.request import Chunk, Finished, Image, Message, Request, SamplingParams, Text

SAMPLE_S = 5.0
SETTLE_S = 60.0  # the first minute: everything is loaded, captured and as full as it gets
WITHHELD = 8  # tokens at an answer's end that had no text: control tokens, an unfinished character
HOST_TOLERANCE_MIB = 32  # an allocator's noise
GPU_TOLERANCE_MIB = 4
IDLE_LIMIT_S = 30.0
PICTURES = 64
IMAGE_TOKENS = 256  # of a request's images, about
COLUMNS = (
    ("streams", "streams"),
    ("cancelled", "cancelled"),
    ("tokens", "tokens"),
    ("tok/s", "tokens_per_s"),
    ("wrong", "failed"),
    ("host MiB", "host_mib.last"),
    ("grown", "host_mib.growth"),
    ("GPU MiB", "gpu_mib.last"),
    ("grown", "gpu_mib.growth"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_engine(parser)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--image-size", type=options.size, default="320x240", help="largest (default: 320x240)")
    parser.add_argument("--prompt-tokens", type=int, default=1500, help="longest question (default: 1500)")
    parser.add_argument("--output-tokens", type=int, default=300, help="longest answer (default: 300)")


@dataclass(slots=True)
class Tally:
    """What happened; one lock for all threads."""

    streams: int = 0
    cancelled: int = 0
    tokens: int = 0
    wrong: Counter[str] = field(default_factory=Counter)  # by what was wrong
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, *, tokens: int = 0, cancelled: bool = False, wrong: str | None = None) -> None:
        with self.lock:
            self.streams += 1
            self.tokens += tokens
            self.cancelled += cancelled
            if wrong is not None:
                self.wrong[wrong] += 1


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    host_mib: int
    gpu_mib: int | None


def measure(arguments: argparse.Namespace) -> Report:
    with storage_folder(arguments) as storage:
        model = ensure_model(arguments.shape, "whole", storage)
        tokens = arguments.prompt_tokens + arguments.output_tokens + IMAGE_TOKENS
        settings = {
            "max_batch_size": arguments.concurrency,
            "kv_cache_mib": kv_mib(decoder_spec(model, storage), tokens, arguments.concurrency),
        }
        config = EngineConfig.from_mapping(settings | settings_from(arguments) | {"storage": storage})
        with contextlib.closing(EngineClient(config)) as client:
            memory = client_memory(client, model)
            report = _soak(arguments, client, model)
            report.card["memory"] = memory
            return report


def _soak(arguments: argparse.Namespace, client: EngineClient, model: str) -> Report:
    tally, samples = Tally(), list[Sample]()
    pid, started = client.pid, time.monotonic()
    assert pid is not None, "the engine has just answered"
    ends = started + 60 * arguments.minutes
    pictures = _pictures(arguments.image_size, arguments.seed)
    callers = [
        threading.Thread(target=_caller, args=(client, Mix(arguments, model, pictures, number), tally, ends))
        for number in range(arguments.concurrency)
    ]
    for caller in callers:
        caller.start()
    while time.monotonic() < ends:
        with contextlib.suppress(FileNotFoundError):  # the process ended; its streams say so
            samples.append(_sample(time.monotonic() - started, pid))
        time.sleep(min(SAMPLE_S, max(0.0, ends - time.monotonic())))
    for caller in callers:
        caller.join()
    seconds = time.monotonic() - started
    if client.pid != pid:
        tally.wrong["the engine's process ended"] += 1
    left = _wait_idle(client)
    if left:
        tally.wrong[f"work was left over: {left}"] += 1
    return _report(tally, samples, seconds)


def _sample(at_s: float, pid: int) -> Sample:
    used = gpu_mib()
    return Sample(round(at_s, 1), resident_mib(pid), None if used is None else sum(used))


def _wait_idle(client: EngineClient) -> dict[str, int]:
    """What the engine still has under way when it should have nothing."""
    deadline = time.monotonic() + IDLE_LIMIT_S
    while (left := busy(client.status() or {"models": {}, "open_requests": 0})) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


class Mix:
    """Requests of all kinds, the same ones for the same seed and caller."""

    def __init__(self, arguments: argparse.Namespace, model: str, pictures: Sequence[bytes], number: int) -> None:
        self.random = random.Random(f"{arguments.seed} {number}")
        self._model, self._pictures = model, pictures
        self._longest, self._most = arguments.prompt_tokens, arguments.output_tokens

    def request(self) -> Request:
        draw = self.random
        parts: list[Text | Image] = [Image(draw.choice(self._pictures)) for _ in range(draw.choice((0, 0, 1, 1, 2)))]
        length = min(self._longest, int(draw.expovariate(4 / self._longest)) + 4)
        parts.append(Text("".join(draw.choices("abcdefghij klmnop?", k=length))))
        kind = draw.choice(MIXED)
        sampling = SamplingParams(
            **kind, max_tokens=draw.randint(1, self._most), ignore_eos=draw.random() < 0.8, stop=self._stop()
        )
        return Request(self._model, (Message("user", tuple(parts)),), sampling)

    def cancels_after(self) -> int | None:
        """Events after which the caller goes away; None: it stays."""
        return self.random.randint(0, 20) if self.random.random() < 0.15 else None

    def _stop(self) -> tuple[str, ...]:
        return ("zq",) if self.random.random() < 0.1 else ()


def _caller(client: EngineClient, mix: Mix, tally: Tally, ends: float) -> None:
    while time.monotonic() < ends:
        request = mix.request()
        _follow(client, request, mix.cancels_after(), tally)


def _follow(client: EngineClient, request: Request, patience: int | None, tally: Tally) -> None:
    """Read one stream to its end, or leave early, and say what was wrong with it."""
    tokens, last = 0, None
    with contextlib.closing(client.stream(request)) as events:
        try:
            for number, event in enumerate(events):
                if patience is not None and number >= patience:
                    tally.count(tokens=tokens, cancelled=True)
                    return
                if last is not None:
                    tally.count(wrong="an event came after the last one")
                    return
                if isinstance(event, Chunk):
                    tokens += event.tokens
                else:
                    last = event
        except EngineError as error:
            tally.count(wrong=f"{error.code}: {error}")
            return
    tally.count(tokens=tokens, wrong=fault(request, tokens, last))


def fault(request: Request, streamed: int, last: Finished | None) -> str | None:
    """What is wrong with a stream that ended: its own count of tokens against the usage it reported."""
    if last is None:
        return "a stream ended without its last event"
    told = last.usage.completion_tokens
    if not streamed <= told <= streamed + WITHHELD:
        return f"usage and stream differ ({'more' if told > streamed else 'fewer'} tokens in the usage)"
    if last.reason == "length" and told != request.sampling.max_tokens:
        return "an answer ended by its length at another length"
    if last.reason == "stop" and request.sampling.ignore_eos and not request.sampling.stop:
        return "an answer stopped that had nothing to stop at"
    return None


def _pictures(size: Size, seed: int) -> list[bytes]:
    sides = [(max(64, size[0] // part), max(64, size[1] // part)) for part in (1, 2, 3)]
    return [request.image for side in sides for request in traffic(PICTURES // 3, size=side, seed=seed, detailed=True)]


def _report(tally: Tally, samples: Sequence[Sample], seconds: float) -> Report:
    host = growth([(sample.at_s, sample.host_mib) for sample in samples], HOST_TOLERANCE_MIB)
    device = growth(
        [(sample.at_s, sample.gpu_mib) for sample in samples if sample.gpu_mib is not None], GPU_TOLERANCE_MIB
    )
    if host and host["grows"]:
        tally.wrong["host memory grows"] += 1
    if device and device["grows"]:
        tally.wrong["device memory grows"] += 1
    row: Row = {
        "row": f"{seconds / 60:.1f} minutes",
        "streams": tally.streams,
        "cancelled": tally.cancelled,
        "tokens": tally.tokens,
        "tokens_per_s": round(tally.tokens / seconds),
        "failed": sum(tally.wrong.values()),
        "wrong": dict(tally.wrong.most_common(20)),
        "host_mib": host,
        "gpu_mib": device,
        "samples": [asdict(sample) for sample in samples],
    }
    return Report([row])


def growth(samples: Sequence[tuple[float, int]], tolerance: int) -> dict[str, Any] | None:
    """The last quarter against the first quarter of what came after SETTLE_S (of a short run: after its first
    quarter), medians in MiB. None with too little to tell."""
    if not samples:
        return None
    settle = min(SETTLE_S, samples[-1][0] / 4)
    values = [value for at, value in samples if at >= settle]
    quarter = max(1, len(values) // 4)
    if len(values) < 2:
        return None
    first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
    return {
        "first": first,
        "last": last,
        "growth": last - first,
        "peak": max(values),
        "grows": last - first > tolerance,
    }
