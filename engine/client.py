"""What the protocol process uses: an engine that runs in a process of its own.

Imports nothing of the engine but its plain records. Works with real threads and under gevent's monkey patches
(engine/process.py).
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, cast

from engine import wire
from engine.config import EngineConfig
from engine.errors import DeadlineExceeded, EngineError, error_from_code
from engine.process import EngineProcess, Inbox
from engine.request import Chunk, Event, Message, Request, Tool

GRACE_S = 15.0  # beyond a request's own limit, which the engine enforces
SILENCE_S = 60.0  # of the whole process, after which a request without an answer means that it hangs
STATUS_TIMEOUT_S = 5.0
FAILED_STARTS = 3  # in a row, before requests are refused at once ...
PAUSE_S = 10.0  # ... for this long
IDLE_S = 60.0  # before a shared client that nobody uses gives way to another configuration

_HOST_COMMAND = (sys.executable, "-m", "engine.host")


class EngineClient:
    """An engine in a process of its own, started at the first request, and again at the next one after a crash.

    Safe for any number of threads or greenlets. `command` starts another host than engine.host (tests); the numbers
    of the two inherited file descriptors are appended to it.
    """

    def __init__(self, config: EngineConfig, *, command: Sequence[str] | None = None) -> None:
        self._config = config
        self._command = tuple(command or _HOST_COMMAND)
        self._starting = threading.Lock()
        self._process: EngineProcess | None = None
        self._users: set[object] = set()
        self._used_at = time.monotonic()

    @property
    def pid(self) -> int | None:
        """Of the engine's process; None when there is none."""
        process = self._process
        return process.pid if process is not None and process.is_usable else None

    @property
    def idle_s(self) -> float:
        """Seconds since the last request ended; 0 while one is open."""
        return 0.0 if self._users else time.monotonic() - self._used_at

    def touch(self) -> None:
        """Count as used now."""
        self._used_at = time.monotonic()

    def stream(self, request: Request) -> Generator[Event]:
        """The request's events, neighbouring chunks joined when the caller is slower than the engine.

        Raises EngineError. Closing the generator cancels the request.
        """
        limit_s = self._limit_s(request.timeout_s)
        replies = self._ask(self._connected, lambda number: wire.Submit(number, request), limit_s)
        yield from cast("Generator[Event]", replies)

    def count_tokens(self, model: str, messages: tuple[Message, ...], tools: tuple[Tool, ...] = ()) -> int:
        """Tokens of the prompt, images included; may wait for the model to load. Raises EngineError."""
        limit_s = self._limit_s(None)
        replies = self._ask(self._connected, lambda number: wire.Count(number, model, messages, tools), limit_s)
        with contextlib.closing(replies):
            return cast(int, next(replies))

    def pull(self, model: str) -> dict[str, Any]:
        """Start the download of a model unless it is there; does not wait for its end. See Engine.pull.

        The engine's process is started if need be. Raises UnknownModel and what keeps the engine from starting.
        """
        replies = self._ask(self._connected, lambda number: wire.Pull(number, model), self._limit_s(STATUS_TIMEOUT_S))
        with contextlib.closing(replies):
            return cast("dict[str, Any]", next(replies))

    def status(self, timeout_s: float = STATUS_TIMEOUT_S) -> dict[str, Any] | None:
        """Plain values about the engine; None when it has not been started, or is still starting.

        Raises DeadlineExceeded when the engine does not answer in time.
        """
        process = self._process
        if process is None or not process.is_ready:
            return None
        replies = self._ask(lambda: process, wire.StatusQuery, timeout_s)
        with contextlib.closing(replies):
            return cast("dict[str, Any]", next(replies))

    def close(self) -> None:
        """End the engine's process; open requests fail with EngineStopped. A later request starts it again."""
        with self._starting:
            process, self._process = self._process, None
        if process is not None:
            process.close()

    def _limit_s(self, timeout_s: float | None) -> float:
        own = self._config.request_timeout_s
        return (own if timeout_s is None else min(own, timeout_s)) + GRACE_S

    def _ask(
        self, connect: Callable[[], EngineProcess], query: Callable[[int], wire.Query], limit_s: float
    ) -> Generator[wire.Reply]:
        """Send one query and yield its replies up to the last; leaving early cancels it."""
        with self._in_use():
            process = connect()
            number, inbox = process.open()
            deadline = time.monotonic() + limit_s
            ended = False
            try:
                process.send(query(number))
                while not ended:
                    for reply in _take(inbox, deadline):
                        ended = not isinstance(reply, Chunk)
                        if isinstance(reply, EngineError):
                            raise reply
                        yield reply
            except queue.Empty:
                if time.monotonic() - process.heard_at > SILENCE_S:
                    process.kill("it stopped answering")
                raise DeadlineExceeded(f"the engine gave no answer within {limit_s:.0f} s; try again") from None
            finally:
                process.forget(number)
                if not ended:
                    process.send(wire.Cancel(number))

    def _connected(self) -> EngineProcess:
        """The process, ready; started when there is none, once however many ask. Raises what keeps it from it."""
        with self._starting:
            process = self._process
            if process is None or not process.is_usable:
                process = self._process = self._started_after(process)
        process.wait_ready()
        return process

    def _started_after(self, last: EngineProcess | None) -> EngineProcess:
        failures = 0
        if last is not None and last.ended is not None and not last.was_ready:
            failures = last.failures + 1
            pause_s = PAUSE_S - (time.monotonic() - last.ended_at)
            if failures >= FAILED_STARTS and pause_s > 0:
                note = f"{last.ended} (tried {failures} times; the next try is in {pause_s:.0f} s)"
                raise error_from_code(last.ended.code, note)
        return EngineProcess(self._config, self._command, failures)

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        # a set of tokens instead of a counter: adding and discarding need no lock, which a generator that the garbage
        # collector closes could find held by its own thread
        token = object()
        self._users.add(token)
        try:
            yield
        finally:
            self.touch()
            self._users.discard(token)


def _take(inbox: Inbox, deadline: float) -> list[wire.Reply]:
    """What waits in the inbox, at least one reply, chunks joined. Raises queue.Empty at the deadline."""
    replies = [inbox.get(timeout=max(0.0, deadline - time.monotonic()))]
    while not inbox.empty():
        replies.append(inbox.get())
    return wire.merge_chunks(replies)


_shared: dict[EngineConfig, EngineClient] = {}
_sharing = threading.Lock()


def shared_client(config: EngineConfig) -> EngineClient:
    """This process's client for a configuration. The engines of other configurations that are idle are closed."""
    with _sharing:
        client = _shared.get(config)
        if client is None:
            client = _shared[config] = EngineClient(config)
        client.touch()
        for other in _shared.values():
            if other is not client and other.pid is not None and other.idle_s > IDLE_S:
                threading.Thread(target=other.close, name="engine-close", daemon=True).start()
    return client
