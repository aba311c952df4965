"""An engine in this process, driven through its own interface, and what its step loop reports."""

from __future__ import annotations

import argparse
import contextlib
import random
import string
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.benches.report import BenchError
from cli.benches.shapes import BUNDLED, Part
from cli.machine import resident_mib
from cli.memory import replica_memory
from cli.settings import settings_from
from engine.catalog import find_checkpoint
from engine.checkpoints import Artifact, Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import Cancelled, EngineError
from engine.model import Model, OpenCuda
from engine.replica import Replica
from engine.request import Chunk, Event, Finished, Message, Request, SamplingParams, Text
from engine.spec import DecoderSpec
from engine.stats import StepRecord
from engine.stream import Stream

TIMEOUT_S = 150.0  # of one row
_POLL_S = 0.02
_LETTERS = string.ascii_lowercase + " "


class StepLog:
    """Every step's record, in the order in which the steps ended.

    The step loop only appends. Whoever waits shares the interpreter with it, so it looks now and then instead of being
    woken for each step, and at each record once: a look costs microseconds, however long the log is.
    """

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def __call__(self, record: StepRecord) -> None:
        self.records.append(record)

    def wait(
        self,
        enough: Callable[[StepRecord], bool],
        work: Sequence[Work],
        timeout_s: float = TIMEOUT_S,
        *,
        first: int = 0,
    ) -> list[StepRecord]:
        """All records from number `first` on, once `enough` is true. It sees each of them, once, in order.

        Raises BenchError when a piece of work failed or ended too early, or time is up.
        """
        deadline, seen = time.monotonic() + timeout_s, first
        while True:
            new = self.records[seen:]
            seen += len(new)
            if any(enough(record) for record in new):
                return self.records[first:seen]
            if ended := next((one for one in work if one.ended is not None), None):
                raise BenchError(f"a request ended before its steps were measured: {ended.ended}")
            if time.monotonic() > deadline:
                raise BenchError(f"not enough steps within {timeout_s:.0f} s")
            time.sleep(_POLL_S)


@dataclass(slots=True, eq=False)
class Work:
    """One request under way; called with its events on the engine's threads."""

    tokens: int = 0
    ended: Finished | EngineError | None = None
    first_at: float = 0.0  # time.perf_counter() of the first token
    over: threading.Event = field(default_factory=threading.Event)
    stream: Stream | None = None

    def __call__(self, event: Event | EngineError) -> None:
        if isinstance(event, Chunk):
            self.first_at = self.first_at or time.perf_counter()
            self.tokens += event.tokens
            return
        self.ended = event
        self.over.set()


def submit(engine: Engine, model: str, text: str, sampling: SamplingParams) -> Work:
    work = Work()
    work.stream = engine.submit(Request(model, (Message("user", (Text(text),)),), sampling), work)
    return work


def finish(work: Sequence[Work], timeout_s: float = TIMEOUT_S) -> None:
    """Wait for all. Raises BenchError for one that failed, or did not end in time."""
    deadline = time.monotonic() + timeout_s
    for one in work:
        if not one.over.wait(max(0.0, deadline - time.monotonic())):
            raise BenchError(f"a request did not end within {timeout_s:.0f} s")
        if isinstance(one.ended, EngineError) and not isinstance(one.ended, Cancelled):
            raise BenchError(f"a request failed: {one.ended}")


def cancel(engine: Engine, work: Sequence[Work]) -> None:
    """End all requests and wait until their memory is free again."""
    for one in work:
        if one.stream is not None:
            one.stream.cancel()
    deadline = time.monotonic() + TIMEOUT_S
    while busy(engine.status()):
        if time.monotonic() > deadline:
            raise BenchError("cancelled requests still run")
        time.sleep(_POLL_S)


def busy(status: dict[str, Any]) -> dict[str, int]:
    """What `Engine.status` counts as under way, without the zeros."""
    replicas = [replica for model in status["models"].values() for replica in model["replicas"]]
    counts = {name: sum(replica[name] for replica in replicas) for name in ("running", "waiting", "kv_blocks_used")}
    counts["open_requests"] = status["open_requests"]
    return {name: count for name, count in counts.items() if count}


class Prompts:
    """Texts of a given number of tokens, each new. The shapes' tokenizers and the demo's make a token of each byte."""

    def __init__(self, engine: Engine, model: str, seed: int = 0) -> None:
        self.shortest = engine.count_tokens(model, (Message("user", (Text("?"),)),))  # the chat template, mostly
        self._random = random.Random(seed)

    def text(self, tokens: int) -> str:
        """Raises BenchError for fewer tokens than the chat template has by itself."""
        if tokens < self.shortest:
            raise BenchError(f"the chat template alone is {self.shortest} tokens; ask for more context than {tokens}")
        return "".join(self._random.choices(_LETTERS, k=tokens - self.shortest)) + "?"


@dataclass(frozen=True, slots=True)
class Bench:
    """A loaded model and its engine."""

    engine: Engine
    model: Model
    steps: StepLog
    prompts: Prompts

    @property
    def device(self) -> str:
        """Where the model is, or its first replica: cpu, or cuda:0."""
        return self.devices[0]

    @property
    def devices(self) -> list[str]:
        """One for each replica."""
        return [replica.device for replica, _ in self.model.replicas]

    @property
    def kv_bytes_per_token(self) -> int:
        return self.model.replicas[0][0].runner.memory().kv_per_token

    def card(self) -> dict[str, Any]:
        artifact = self.model.artifact
        return {
            "model": self.model.name,
            "family": artifact.spec.family,
            "device": ", ".join(self.devices),
            "precision": artifact.precision,
            "numerics": self.model.numerics.partition(" ")[2],  # without the weights' digest; names operators of ours
            "weight_bytes": artifact.weight_bytes,
            "memory": replica_memory(self.engine.status(), self.model.name),
            "host_rss_mib": resident_mib(),
        }


@contextlib.contextmanager
def storage_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """The folder of --storage, which keeps checkpoints for the next call, or one that goes away."""
    if arguments.storage:
        yield arguments.storage.expanduser().absolute()
        return
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
        yield Path(folder)


def ensure_model(shape: str, part: Part, storage: Path) -> str:
    """As `ensure_checkpoint`, without torch for the bundled model."""
    if shape == BUNDLED:
        return BUNDLED
    from cli.benches.checkpoint import ensure_checkpoint

    return ensure_checkpoint(shape, part, storage)


@contextlib.contextmanager
def open_bench(
    arguments: argparse.Namespace,
    storage: Path,
    part: Part,
    settings: dict[str, Any],
    context: int,
    batch: int,
    open_cuda: OpenCuda | None = None,
) -> Iterator[Bench]:
    """An engine with the shape loaded, caches off, and room for `batch` sequences of `context` tokens.

    `open_cuda` opens its replicas on GPUs. Without it they open as the engine's own do, except that our operators round
    all activations of a shape: which layers bear it is a question to trained weights.

    Raises EngineError.
    """
    name = ensure_model(arguments.shape, part, storage)
    memory = kv_mib(decoder_spec(name, storage), context, batch)
    values: dict[str, Any] = {"max_batch_size": batch, "kv_cache_mib": memory, **settings}
    values |= {**settings_from(arguments), "storage": storage, "cache_enabled": False}
    steps = StepLog()
    config = EngineConfig.from_mapping(values)
    opened = open_cuda or (open_all_int8 if config.kernel_fusion == "on" else None)
    with contextlib.closing(Engine(config, on_step=steps, open_cuda=opened)) as engine:
        yield Bench(engine, engine.load(name), steps, Prompts(engine, name, arguments.seed))


def open_all_int8(name: str, artifact: Artifact, config: EngineConfig, index: int, *, tuning: bool = True) -> Replica:
    """A replica whose operators of our own, if the setting wants them, round all activations."""
    import torch

    from engine.runners.fusion import Parts, wanted_fusion
    from engine.runners.open_cuda import open_cuda

    wanted = wanted_fusion(artifact, config, torch.device("cuda", index))
    return open_cuda(name, artifact, config, index, Parts(wanted, tuning=tuning))


def decoder_spec(model: str, storage: Path) -> DecoderSpec:
    return Checkpoint.open(find_checkpoint(model, storage)).spec.decoder


def kv_mib(decoder: DecoderSpec, context: int, batch: int) -> int:
    """A CPU's budget, for keys and values in fp32; a little more than needed, so that no sequence is set back."""
    return 16 + batch * (context + 32) * decoder.kv_bytes_per_token // 2**20
