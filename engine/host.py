"""The engine's process: `python -m engine.host SOCKET LIFELINE`, two inherited file descriptors.

SOCKET carries the frames of engine/wire.py. LIFELINE is the reading end of a pipe whose writing end only the parent
holds: when the parent is gone, however it went, the kernel ends this process, whatever it is doing.

Three kinds of threads: this module's reader (frames to engine calls), this module's writer (the main thread), and the
engine's own, which hand their events to the `Outbox` and go on.
"""

from __future__ import annotations

import faulthandler
import fcntl
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from engine import wire
from engine.config import EngineConfig
from engine.errors import DeviceLost, EngineError, EngineStopped
from engine.request import Chunk, Event, Message, Request, Tool

COUNTING_THREADS = 4
MERGE_EVERY = 64  # replies of one request that wait before their chunks are joined
BUSY_STREAMS = 4
PACE_S = 0.02

log = logging.getLogger(__name__)


class OpenStream(Protocol):
    def cancel(self) -> None: ...


class ServedEngine(Protocol):
    """What this module needs of engine.engine.Engine."""

    def submit(self, request: Request, on_event: Callable[[Event | EngineError], None]) -> OpenStream: ...

    def count_tokens(self, model: str, messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> int: ...

    def status(self) -> dict[str, Any]: ...

    def pull(self, name: str) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Outbox:
    """Replies on their way to the client, kept per request.

    Whatever queues up while a frame is being sent travels in the next one, neighbouring chunks joined: an idle line
    adds no delay, and memory stays bounded by the number of requests and the length of their texts. With more than
    BUSY_STREAMS requests answered at once, replies leave at a pace: a request's first and last at once, the
    chunks between every PACE_S, because every message costs the protocol process and Dify's daemon the same, and
    waking the writer for each token costs the step loop.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[int, list[wire.Reply]] = {}
        self._streaming: set[int] = set()  # requests whose first chunk came, and whose last reply did not
        self._urgent: set[int] = set()
        self._paced_until = 0.0

    def put(self, number: int, reply: wire.Reply) -> None:
        with self._changed:
            is_first = not self._waiting
            replies = self._waiting.setdefault(number, [])
            replies.append(reply)
            if len(replies) >= MERGE_EVERY:
                replies[:] = wire.merge_chunks(replies)
            if not isinstance(reply, Chunk):
                self._streaming.discard(number)
                self._urgent.add(number)
            elif number not in self._streaming:
                self._streaming.add(number)
                self._urgent.add(number)
            if self._urgent or is_first or not self._is_busy:
                self._changed.notify()

    def take(self) -> wire.Replies:
        """What may leave now; blocks until there is something. The order within a request is kept."""
        with self._changed:
            while self._is_busy and time.monotonic() < self._paced_until:
                if self._urgent:
                    return self._replies({number: self._waiting.pop(number) for number in self._urgent})
                self._changed.wait(max(0.0, self._paced_until - time.monotonic()))
            while not self._waiting:
                self._changed.wait()
            self._paced_until = time.monotonic() + PACE_S
            taken, self._waiting = self._waiting, {}
            return self._replies(taken)

    @property
    def _is_busy(self) -> bool:
        return len(self._streaming) > BUSY_STREAMS

    def _replies(self, taken: dict[int, list[wire.Reply]]) -> wire.Replies:
        self._urgent.clear()
        return wire.Replies(
            tuple((number, reply) for number, replies in taken.items() for reply in wire.merge_chunks(replies))
        )


class Host:
    """Turns the client's messages into calls of one engine and the engine's events into replies."""

    def __init__(self, engine: ServedEngine, outbox: Outbox) -> None:
        self._engine = engine
        self._outbox = outbox
        self._streams: dict[int, OpenStream] = {}
        self._counting = ThreadPoolExecutor(COUNTING_THREADS, thread_name_prefix="count")
        self._reporting = ThreadPoolExecutor(1, thread_name_prefix="status")

    def handle(self, query: wire.Query | wire.Malformed) -> None:
        """Runs on the reader's thread and must not block: what may block goes to a worker."""
        match query:
            case wire.Submit(number, request):
                self._reported(number, lambda: self._submit(number, request))
            case wire.Cancel(number):
                self._cancel(number)
            case wire.Count(number, model, messages, tools):
                self._counting.submit(self._reported, number, lambda: self._count(number, model, messages, tools))
            case wire.StatusQuery(number):
                self._reporting.submit(self._reported, number, lambda: self._report_status(number))
            case wire.Pull(number, model):
                self._reporting.submit(
                    self._reported, number, lambda: self._outbox.put(number, self._engine.pull(model))
                )
            case wire.Malformed(number, error):
                self._outbox.put(number, error)
            case wire.Close():
                self._engine.close()
                os._exit(0)
            case wire.Hello():
                raise wire.ProtocolError("a second Hello")

    def _submit(self, number: int, request: Request) -> None:
        ended = threading.Event()

        def on_event(event: Event | EngineError) -> None:
            if not isinstance(event, Chunk):
                ended.set()
                self._streams.pop(number, None)
            self._outbox.put(number, event)

        stream = self._engine.submit(request, on_event)
        self._streams[number] = stream
        if ended.is_set():  # before the line above, perhaps: then nobody else would take it out
            self._streams.pop(number, None)

    def _cancel(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is None:
            return
        try:
            stream.cancel()
        except Exception:
            log.exception("cancelling request %d failed", number)

    def _count(self, number: int, model: str, messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> None:
        self._outbox.put(number, self._engine.count_tokens(model, messages, tools))

    def _report_status(self, number: int) -> None:
        plain = json.loads(json.dumps(self._engine.status(), default=str))
        self._outbox.put(number, plain)

    def _reported(self, number: int, work: Callable[[], None]) -> None:
        """Whatever `work` raises becomes the request's last reply; the process goes on."""
        try:
            work()
        except EngineError as error:
            self._outbox.put(number, error)
        except Exception as problem:
            log.exception("request %d failed unexpectedly", number)
            self._outbox.put(number, EngineError(f"unexpected {type(problem).__name__} in the engine: {problem}"))


def build_engine(config: EngineConfig) -> ServedEngine:
    """The real engine. Imported here, so that the connection is watched while the libraries load."""
    from engine.engine import Engine

    if folder := os.environ.get("TESSERA_TRACE"):  # set by `./tessera bench serve --trace`
        from engine.runtime.cuda.trace import serve_traces

        serve_traces(Path(folder))
    return Engine(config)


def serve(build: Callable[[EngineConfig], ServedEngine], descriptors: Sequence[str]) -> NoReturn:
    """Run until the client closes or is gone. `descriptors` are SOCKET and LIFELINE.

    `build` makes the engine; tests pass one that makes a fake.
    """
    socket_fd, lifeline = map(int, descriptors)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the parent decides
    _die_with_parent(lifeline)
    _start_logging()
    threading.excepthook = _end_with_thread
    connection = socket.socket(fileno=socket_fd)
    connection.set_inheritable(False)
    connection.setblocking(True)  # a parent that uses gevent has made it non-blocking
    frames = connection.makefile("rb")
    config = _greet(connection, frames)
    outbox = Outbox()
    host: Future[Host] = Future()
    threading.Thread(target=_read, args=(frames, host), name="reader", daemon=True).start()
    host.set_result(Host(_built(build, config, connection), outbox))
    _send(connection, wire.Ready(os.getpid()))
    while True:
        answer = outbox.take()
        _send(connection, answer)
        if lost := [reply for _, reply in answer.replies if isinstance(reply, DeviceLost)]:
            _refuse(connection, lost[0])  # for everybody else; a new process can use the GPU again, this one cannot


def _end_with_thread(death: threading.ExceptHookArgs) -> NoReturn:
    """A thread that dies of a bug (the step loop, say) would leave every request hanging; a new process does better."""
    name = "a thread" if death.thread is None else death.thread.name
    problem = death.exc_value or death.exc_type()
    log.critical("%s died; the process ends with it", name, exc_info=problem)
    os._exit(1)


def _greet(connection: socket.socket, frames: IO[bytes]) -> EngineConfig:
    """Read Hello. Anything else is answered with an error and ends the process."""
    try:
        payload = wire.read_frame(frames)
        if payload is None:
            os._exit(0)
        hello = wire.decode_query(payload)
        if not isinstance(hello, wire.Hello):
            raise wire.ProtocolError("the first message must be Hello")
        return EngineConfig.from_mapping(hello.config)
    except wire.ProtocolError as problem:
        _refuse(connection, EngineStopped(str(problem)))
    except EngineError as error:
        _refuse(connection, error)


def _built(
    build: Callable[[EngineConfig], ServedEngine], config: EngineConfig, connection: socket.socket
) -> ServedEngine:
    """The engine; when it cannot be built the client hears why and the process ends."""
    try:
        return build(config)
    except EngineError as error:
        _refuse(connection, error)
    except BaseException:  # noqa: BLE001  whatever a library raises while it loads; the client shows the traceback's end
        traceback.print_exc()
        os._exit(1)


def _read(frames: IO[bytes], host: Future[Host]) -> NoReturn:
    """The reader's thread: ends the process when the client is gone, even while the engine is being built."""
    try:
        while (payload := wire.read_frame(frames)) is not None:
            query = wire.decode_query(payload)
            if host.done():
                host.result().handle(query)
            elif isinstance(query, wire.Close):
                break
            else:
                raise wire.ProtocolError("a request before Ready")
    except Exception:  # a host that no longer reads would leave every request hanging
        log.exception("the line to the client broke")
        os._exit(1)
    os._exit(0)


def _send(connection: socket.socket, answer: wire.Answer) -> None:
    try:
        connection.sendall(wire.encode(answer))
    except OSError:
        os._exit(0)  # the client is gone


def _refuse(connection: socket.socket, error: EngineError) -> NoReturn:
    _send(connection, wire.Replies(((wire.CONNECTION, error),)))
    os._exit(1)


def _die_with_parent(lifeline: int) -> None:
    """Ask the kernel for SIGIO, whose default is to end the process, when the pipe's last writer is gone.

    The reader's thread notices a closed socket too, but it needs the GIL, which a library may hold for seconds while
    it loads. (PR_SET_PDEATHSIG would follow the parent's thread, not its process.)
    """
    os.set_inheritable(lifeline, False)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    watch = select.poll()
    watch.register(lifeline, 0)  # POLLHUP is always reported
    if watch.poll(0):
        os._exit(0)  # gone before the kernel was asked


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", " | ")


def _start_logging() -> None:
    faulthandler.enable()
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[to_stderr])


if __name__ == "__main__":
    serve(build_engine, sys.argv[1:])
