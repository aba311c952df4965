"""One engine process from its start to its end, seen from the protocol process.

Ordinary threading, sockets, queues and subprocesses only: the same code runs with real threads and under gevent's
monkey patches, where each of its threads is a greenlet and nothing here blocks the hub.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from engine import wire
from engine.config import EngineConfig
from engine.errors import EngineError, EngineStopped, error_from_code

START_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 5.0  # for a clean end; then the process is killed
EXIT_TIMEOUT_S = 1.0  # between the end of the connection and the end of the process
REMEMBERED_LINES = 20  # of the process's output
REMEMBERED_CHARACTERS = 2000
LINE_BYTES = 1 << 16  # a longer line is passed on in pieces

_ROOT = Path(__file__).resolve().parent.parent
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

type Inbox = queue.SimpleQueue[wire.Reply]  # lazy: monkey patches may come later than this import


class EngineProcess:
    """A running host and the line to it. Raises EngineStopped when it cannot be started at all.

    Three threads: the reader hands replies to the inboxes of their requests and, at the end, the error; the writer
    sends, so that a closing generator, whichever thread collects it, never blocks and takes no lock; the forwarder
    passes the process's output on to our stderr. The process's stdout is our stderr too: our stdout is Dify's.

    `failures` is how many starts in a row failed before this one.
    """

    def __init__(self, config: EngineConfig, command: Sequence[str], failures: int = 0) -> None:
        self.failures = failures
        self.was_ready = False
        self.ended: EngineError | None = None  # why, once it is over
        self.ended_at = 0.0
        self.heard_at = time.monotonic()
        self._disconnected = False
        self._settled = threading.Event()  # ready or over
        self._cause: EngineError | None = None  # what the process said before it ended itself
        self._reason: str | None = None  # why we ended it, when it was us
        self._numbers = itertools.count(wire.CONNECTION + 1)
        self._inboxes: dict[int, Inbox] = {}
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._output: deque[str] = deque(maxlen=REMEMBERED_LINES)
        self._start(command)
        self.send(wire.Hello(config.to_mapping()))
        self._forwarder = _thread(self._forward, "engine-output")
        self._writer = _thread(self._write, "engine-writer")
        self._reader = _thread(self._read, "engine-reader")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """Ready, or still starting."""
        return self.ended is None and not (self._disconnected and self.was_ready)

    @property
    def is_ready(self) -> bool:
        return self.was_ready and self.is_usable

    def wait_ready(self) -> None:
        """Raises what kept the process from getting ready, or has ended it since."""
        if not self._settled.wait(START_TIMEOUT_S):
            self.kill(f"not ready within {START_TIMEOUT_S:.0f} s")
            self._settled.wait()
        if self.ended is not None:
            raise _copy(self.ended)

    def open(self) -> tuple[int, Inbox]:
        """A number for a new request, and where its replies will come. A process that is over replies with why."""
        number = next(self._numbers)
        inbox: Inbox = queue.SimpleQueue()
        self._inboxes[number] = inbox
        if self.ended is not None:
            inbox.put(_copy(self.ended))
        return number, inbox

    def forget(self, number: int) -> None:
        """Replies to this number are of no interest any more."""
        self._inboxes.pop(number, None)

    def send(self, query: wire.Query) -> None:
        """Never blocks. Raises InvalidRequest for what cannot be sent."""
        self._outbox.put(wire.encode(query))

    def kill(self, reason: str) -> None:
        self._reason = self._reason or reason
        with contextlib.suppress(OSError):
            self._process.kill()

    def close(self) -> None:
        """Ask the engine to end, kill its process if it does not, and wait until it is gone."""
        self._reason = self._reason or "closed"
        self.send(wire.Close())
        self._reader.join(CLOSE_TIMEOUT_S)
        self.kill("closed")
        self._reader.join()

    def _start(self, command: Sequence[str]) -> None:
        self._connection, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()  # nothing is ever written: the host dies when our end closes
        passed = (theirs.fileno(), lifeline)
        try:
            self._process = subprocess.Popen(
                (*command, *map(str, passed)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=passed,
                cwd=_ROOT,
                env=_environment(),
            )
        except OSError as problem:
            self._connection.close()
            os.close(self._lifeline)
            raise EngineStopped(f"the engine's process could not be started: {problem}") from None
        finally:
            theirs.close()
            os.close(lifeline)

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as frames:
                while (payload := wire.read_frame(frames)) is not None:
                    self._receive(wire.decode_answer(payload))
                    time.sleep(0)  # under gevent a greenlet that always finds data would keep the others waiting
        except wire.ProtocolError as problem:
            self.kill(f"protocol error: {problem}")
        except OSError:
            pass  # reset: the process ended before it had read everything
        finally:
            self._end()

    def _receive(self, answer: wire.Answer) -> None:
        self.heard_at = time.monotonic()
        if isinstance(answer, wire.Ready):
            self.was_ready = True
            self._settled.set()
            return
        for number, reply in answer.replies:
            inbox = self._inboxes.get(number)
            if inbox is not None:
                inbox.put(reply)
            elif number == wire.CONNECTION and isinstance(reply, EngineError):
                self._cause = reply

    def _end(self) -> None:
        """The connection is gone: see the process off, then tell everyone who waits."""
        self._disconnected = True
        try:
            self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill("it closed its connection")
            self._process.wait()
        self._outbox.put(None)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._writer.join()
        self._connection.close()
        os.close(self._lifeline)
        self._forwarder.join(EXIT_TIMEOUT_S)  # a child of the engine may hold its output open
        self.ended_at = time.monotonic()
        self.ended = self._cause or EngineStopped(self._epitaph())
        self._settled.set()
        for inbox in list(self._inboxes.values()):
            inbox.put(_copy(self.ended))

    def _epitaph(self) -> str:
        how = self._reason or _manner(self._process.returncode)
        if self.was_ready:
            return f"the engine's process ended ({how}); the request was not finished, try again"
        last = "\n".join(self._output)[-REMEMBERED_CHARACTERS:]
        return f"the engine's process could not start ({how})" + (f"; its last words:\n{last}" if last else "")

    def _write(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                self._connection.sendall(frame)
            except OSError:
                return  # the reader sees the same and ends the line

    def _forward(self) -> None:
        output = self._process.stdout
        assert output is not None
        with output, contextlib.suppress(OSError):
            while line := output.readline(LINE_BYTES):
                self._output.append(line.decode(errors="replace").rstrip())
                with contextlib.suppress(OSError):
                    os.write(2, line)
                time.sleep(0)


def _environment() -> dict[str, str]:
    """Inherited, and what the operator set wins, except that our package is found and no output is held back."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return {**_QUIET, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _manner(returncode: int | None) -> str:
    if returncode is None or returncode >= 0:
        return f"exit status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = "unknown"
    hint = ": killed by somebody, or for lack of memory" if -returncode == signal.SIGKILL else ""
    return f"signal {-returncode}, {name}{hint}"


def _copy(error: EngineError) -> EngineError:
    """One for each who raises it: an exception carries its own traceback."""
    return error_from_code(error.code, str(error))


def _thread(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
