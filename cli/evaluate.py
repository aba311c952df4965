"""./tessera eval: accuracy on data with known answers, through the engine; and perplexity."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import perplexity
from cli.machine import card
from cli.settings import add_engine_settings, settings_from
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.request import Chunk, Event, Finished, Image, Message, Request, SamplingParams, Text
from evaluation import easy_vqa, printed_words
from evaluation.samples import Sample

PERPLEXITY = "perplexity"
CONCURRENT = 64  # requests in flight; bounds memory, fills batches
DATA: dict[str, Callable[[], Iterable[Sample]]] = {
    "easy-vqa": easy_vqa.test_samples,
    "printed-words": printed_words.test_samples,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", choices=sorted([*DATA, PERPLEXITY]))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, help="only the first N questions")
    add_engine_settings(parser)
    parser.add_argument("--storage", type=Path, help="storage folder (default: the engine's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    perplexity.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the accuracy with its 95 % interval, and some of what was wrong."""
    if arguments.data == PERPLEXITY:
        return perplexity.run(arguments)
    try:
        engine = Engine(EngineConfig.from_mapping(settings_from(arguments) | {"cache_enabled": "false"}))
    except EngineError as error:
        print(f"tessera eval: {error}", file=sys.stderr)
        return 1
    try:
        started = time.monotonic()
        samples = itertools.islice(DATA[arguments.data](), arguments.limit)
        result = score(engine, arguments.model, samples)
        seconds = time.monotonic() - started
        precision = _precision(engine, arguments.model)
    except EngineError as error:
        print(f"tessera eval: {error}", file=sys.stderr)
        return 1
    finally:
        engine.close()
    report(arguments, precision, result, seconds)
    return 0


@dataclass(slots=True)
class Score:
    """Exact matches; `wrong` holds a few (question, expected, answer) for people to look at."""

    asked: int = 0
    right: int = 0
    wrong: list[tuple[str, str, str]] | None = None

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.asked)

    @property
    def interval(self) -> float:
        """Half of the 95 % confidence interval, normal approximation."""
        return 1.96 * math.sqrt(self.accuracy * (1 - self.accuracy) / max(1, self.asked))


def score(engine: Engine, model: str, samples: Iterable[Sample]) -> Score:
    """Ask everything, CONCURRENT requests at a time. Raises the first EngineError met."""
    result = Score(wrong=[])
    for sample, answer in answers(engine, model, samples):
        result.asked += 1
        if answer == sample.answer:
            result.right += 1
        elif result.wrong is not None and len(result.wrong) < 10:
            result.wrong.append((sample.question, sample.answer, answer))
    return result


def answers(engine: Engine, model: str, samples: Iterable[Sample]) -> Iterator[tuple[Sample, str]]:
    """Each sample with the engine's greedy answer, in order."""
    window: list[tuple[Sample, _Answer]] = []
    for sample in samples:
        window.append((sample, _Answer(engine, model, sample)))
        if len(window) >= CONCURRENT:
            first, answer = window.pop(0)
            yield first, answer.text()
    for sample, answer in window:
        yield sample, answer.text()


class _Answer:
    """One request under way."""

    def __init__(self, engine: Engine, model: str, sample: Sample) -> None:
        self._texts: list[str] = []
        self._done = threading.Event()
        self._error: EngineError | None = None
        message = Message("user", (Image(sample.image), Text(sample.question)))
        engine.submit(Request(model, (message,), SamplingParams(max_tokens=32)), self._take)

    def _take(self, event: Event | EngineError) -> None:
        if isinstance(event, Chunk):
            self._texts.append(event.text)
            return
        self._error = None if isinstance(event, Finished) else event
        self._done.set()

    def text(self) -> str:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return "".join(self._texts).strip()


def _precision(engine: Engine, model: str) -> str:
    """What `auto` came to."""
    loaded = engine.status()["models"].get(model)  # absent when there was nothing to ask
    return str(loaded["precision"]) if loaded else engine.config.precision


def report(arguments: argparse.Namespace, precision: str, result: Score, seconds: float) -> None:
    """Text to stderr for people, the accuracy (or the JSON object) to stdout."""
    for question, expected, answer in result.wrong or []:
        print(f"  {question!r}: expected {expected!r}, got {answer!r}", file=sys.stderr)
    line = f"{arguments.data} {precision}: {100 * result.accuracy:.2f} % +- {100 * result.interval:.2f}"
    print(f"{line} of {result.asked} ({result.asked / seconds:.0f} questions/s)")
    if arguments.json:
        fields: dict[str, Any] = {
            "data": arguments.data,
            "model": arguments.model,
            "precision": precision,
            "asked": result.asked,
            "right": result.right,
            "accuracy": result.accuracy,
            "interval_95": result.interval,
            "seconds": round(seconds, 2),
            "machine": card(),
        }
        print(json.dumps(fields))
