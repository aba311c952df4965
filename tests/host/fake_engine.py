"""An engine without models, and a host process that serves it: `python fake_engine.py SOCKET LIFELINE`.

The model's name says what a request does; the environment variable FAKE_START says how the start goes.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import Cancelled, ContextOverflow, DeviceLost, EngineError, QueueFull, StorageError, UnknownModel
from engine.host import serve
from engine.request import (
    Chunk,
    Event,
    Finished,
    Image,
    ImageUrl,
    Message,
    Part,
    Request,
    Text,
    Timings,
    Tool,
    Usage,
    Video,
    VideoUrl,
)

COMMAND = (sys.executable, str(Path(__file__).resolve()))

OnEvent = Callable[[Event | EngineError], None]


@dataclass(eq=False)
class FakeStream:
    request: Request
    on_event: OnEvent
    engine: FakeEngine
    emitted: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """A step loop that gives every open stream one token per step, `step_s` (the request's model says) apart."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._streams: list[FakeStream] = []
        self._cancelled = 0
        self._submitted = 0
        self._wake = threading.Event()
        _start(os.environ.get("FAKE_START", ""))
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: Request, on_event: OnEvent) -> FakeStream:
        self._submitted += 1
        stream = FakeStream(request, on_event, self)
        _act(request.model, on_event)
        if request.model in ("words", "paced", "endless", "fails"):
            self._streams.append(stream)
            self._wake.set()
        return stream

    def count_tokens(self, model: str, messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> int:
        if model == "slow":
            time.sleep(30)
        return sum(_weight(part) for message in messages for part in message.parts)

    def status(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "submitted": self._submitted,
            "cancelled": self._cancelled,
            "open": len(self._streams),
            "storage": self.config.storage,
            "imported": sorted(sys.modules),
            "environment": dict(os.environ),
            "stdin": str(Path("/dev/fd/0").resolve()),
        }

    def pull(self, name: str) -> dict[str, Any]:
        if name == "nonsense":
            raise UnknownModel("nonsense")
        return {"state": "downloading", "note": name}

    def close(self) -> None:
        time.sleep(30 if os.environ.get("FAKE_CLOSE") == "hangs" else 0)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._streams:
                for stream in tuple(self._streams):
                    if self._step(stream):
                        self._streams.remove(stream)
                if any(stream.request.model != "words" for stream in self._streams):
                    time.sleep(0.005)

    def _step(self, stream: FakeStream) -> bool:
        request, emit = stream.request, stream.on_event
        if stream.cancelled.is_set():
            self._cancelled += 1
            emit(Cancelled("cancelled"))
            return True
        if request.model == "fails" and stream.emitted == 2:
            emit(ContextOverflow("too long"))
            return True
        if request.model != "endless" and stream.emitted == request.sampling.max_tokens:
            weight = sum(len(image.data) for image in request.shown)
            emit(Finished("length", Usage(weight, stream.emitted, weight, 0), Timings(0.0, 0.1, 0.2)))
            return True
        emit(Chunk(f"{stream.emitted} ", 1))
        stream.emitted += 1
        return False


def _weight(part: Part) -> int:
    match part:
        case Text(text):
            return len(text)
        case Image(data) | Video(data):
            return len(data)
        case ImageUrl(url) | VideoUrl(url):
            return len(url)


def _fail() -> None:
    raise ZeroDivisionError("a bug on a thread of its own")


def _act(model: str, emit: OnEvent) -> None:
    """What a request of this name does to the process, or raises."""
    if model == "refused":
        raise QueueFull("the queue is full (1 waiting); try again")
    if model == "bug":
        raise ZeroDivisionError("a bug\non two lines")
    if model == "crash":
        ctypes.string_at(0)
    if model == "loses-a-thread":
        _thread(_fail)
    if model == "loses-the-gpu":
        emit(DeviceLost("cuda:0 failed"))
    if model == "spins":
        _thread(_spin)
    if model == "holds-the-gil":
        _thread(_hold_the_gil)
    if model == "frees-the-gil":
        _thread(lambda: ctypes.CDLL(None).sleep(60))
    if model == "noise":
        libc = ctypes.CDLL(None)
        for _ in range(100):
            print("noise by print")
            os.write(1, b"noise by write\n")
            libc.puts(b"noise by puts")
        libc.fflush(None)
        emit(Finished("stop", Usage(1, 1), Timings(0.0, 0.0, 0.0)))


def _start(how: str) -> None:
    if how == "import":
        import a_library_that_is_missing  # type: ignore[import-not-found]  # noqa: F401
    if how == "storage":
        raise StorageError("the storage folder is read-only")
    if how == "exit":
        print("my last words", file=sys.stderr)
        os._exit(3)
    if how == "holds-the-gil":
        ctypes.PyDLL(None).sleep(60)
    if how == "slow":
        time.sleep(60)


def _hold_the_gil() -> None:
    time.sleep(0.2)  # so that whoever waits for the request's arrival hears of it
    ctypes.PyDLL(None).sleep(60)


def _spin() -> None:
    while True:
        pass


def _thread(target: Callable[[], Any]) -> None:
    threading.Thread(target=target, daemon=True).start()


if __name__ == "__main__":
    serve(FakeEngine, sys.argv[1:])
