"""The events of one request on their way to whoever asked."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator

from engine.errors import Cancelled, EngineError
from engine.prompts import AnswerReader
from engine.request import Event, Finished

logger = logging.getLogger(__name__)
OnEvent = Callable[[Event | EngineError], None]


class Stream:
    """Events in order; the last one is Finished or an EngineError, whatever happens.

    Either `on_event` gets each event on an engine thread (it must not block), or the caller iterates. `deadline` is a
    time.monotonic() value. `on_end` is called once, after the last event.
    """

    def __init__(self, on_event: OnEvent | None, *, deadline: float, on_end: Callable[[Stream], None]) -> None:
        self._events: queue.SimpleQueue[Event | EngineError] = queue.SimpleQueue()
        self._on_event = on_event or self._events.put
        self._on_end = on_end
        self._lock = threading.Lock()
        self._ended = False
        self.last: Finished | EngineError | None = None  # once it has ended
        self.deadline = deadline
        self.reader: AnswerReader | None = None  # set before the first chunk

    @property
    def has_ended(self) -> bool:
        return self._ended

    def push(self, event: Event | EngineError) -> None:
        """Deliver an event; nothing reaches a stream that has ended."""
        last = event if isinstance(event, EngineError | Finished) else None
        with self._lock:
            if self._ended:
                return
            self.last, self._ended = last, last is not None
            for shown in (event,) if self.reader is None else self.reader.read(event):
                self._on_event(shown)
        if last is not None:
            self._on_end(self)

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Whatever goes wrong inside ends the stream: its caller would wait for ever otherwise."""
        try:
            yield
        except EngineError as error:
            self.push(error)
        except Exception as error:
            logger.exception("preparing a request failed")
            self.push(EngineError(f"preparing the request failed: {error}"))

    def cancel(self) -> None:
        """End the stream now, from any thread; work that nobody else waits for stops at the next step."""
        self.push(Cancelled("the request was cancelled by its caller"))

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            if isinstance(event, EngineError):
                raise event
            yield event
            if isinstance(event, Finished):
                return
