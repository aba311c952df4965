"""Requests as a caller makes them, and what comes back of them."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image as Picture

from engine.engine import Engine
from engine.errors import EngineError
from engine.request import Chunk, Event, Finished, Image, Message, Part, Request, SamplingParams, Text
from engine.stream import Stream

WORDS = ["what", "shape", "is", "in", "the", "image", "red", "circle", "a", "blue", "read", "word", "colour"]


def replica(engine: Engine, model: str) -> Any:
    """What runs the model on the only device; tests look into it."""
    return engine.load(model).replicas[0][0]


def note_set_backs(scheduler: Any) -> list[int]:
    """How many tokens of output each sequence had that is set back from now on."""
    noted: list[int] = []
    original = scheduler._set_back

    def set_back(sequence: Any) -> None:
        noted.append(len(sequence.output))
        original(sequence)

    scheduler._set_back = set_back
    return noted


@dataclass(slots=True)
class Answer:
    """One request under way; `wait` returns it ended."""

    chunks: list[str] = field(default_factory=list)
    tokens: int = 0
    finished: Finished | None = None
    error: EngineError | None = None
    stream: Stream | None = None
    _ended: threading.Event = field(default_factory=threading.Event)

    def take(self, event: Event | EngineError) -> None:
        if isinstance(event, Chunk):
            self.chunks.append(event.text)
            self.tokens += event.tokens
            return
        if isinstance(event, Finished):
            self.finished = event
        else:
            self.error = event
        self._ended.set()

    def wait(self, limit_s: float = 60) -> Answer:
        assert self._ended.wait(limit_s), "the request did not end"
        return self

    @property
    def text(self) -> str:
        if self.error is not None:
            raise self.error
        return "".join(self.chunks)

    @property
    def result(self) -> tuple[str, str, int]:
        """What must not depend on the neighbours: text, reason, number of tokens."""
        text = self.text
        assert self.finished is not None
        return text, self.finished.reason, self.finished.usage.completion_tokens


def ask(engine: Engine, request: Request) -> Answer:
    answer = Answer()
    answer.stream = engine.submit(request, answer.take)
    return answer


def request(*parts: str | bytes, model: str = "demo", timeout_s: float | None = None, **sampling: Any) -> Request:
    """One user turn; bytes are image files."""
    content: list[Part] = [Text(part) if isinstance(part, str) else Image(part) for part in parts]
    return Request(model, (Message("user", tuple(content)),), SamplingParams(**sampling), timeout_s)


def about(*shown: Part, text: str, model: str, **sampling: Any) -> Request:
    """One user turn: what is shown, then the text."""
    return Request(model, (Message("user", (*shown, Text(text))),), SamplingParams(**sampling))


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A PNG that no other seed gives."""
    random = np.random.default_rng(seed)
    small = Picture.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size, Picture.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def mixed_requests(count: int, model: str, *, sizes: list[tuple[int, int]]) -> list[Request]:
    """Prompts of many lengths, none to three images (some of them the same), greedy and seeded, with penalties."""
    random = np.random.default_rng(1)
    requests = []
    for number in range(count):
        words = " ".join(random.choice(WORDS, int(random.integers(1, 60))))
        images = [
            picture(int(random.integers(20)), sizes[int(random.integers(len(sizes)))])
            for _ in range(int(random.integers(4)))
        ]
        seeded = {"temperature": 1.3, "seed": number, "top_p": 0.95} if number % 2 else {"temperature": 0.0}
        penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.3} if number % 3 == 0 else {}
        length = int(random.integers(4, 40))
        sampling = seeded | penalties | {"max_tokens": length, "ignore_eos": bool(number % 5)}
        requests.append(request(*images, f"{words}?", model=model, **sampling))
    return requests
