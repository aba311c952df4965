"""A stand-in for Dify's plugin daemon: one plugin process, its protocol, and the daemon's rules about both.

What it does is what the daemon's local runtime does (langgenius/dify-plugin-daemon, internal/core/local_runtime and
internal/core/io_tunnel): it starts `python -m main` in the plugin's folder with INSTALL_METHOD=local, writes one JSON
line per request, reads JSON lines, and kills the process for a line over the limit or for silence. Nothing tells the
plugin that a caller has gone. Where the daemon would let a request of a crashed plugin wait for its time limit, this
one fails it at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader, BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROVIDER = "tessera"


@dataclass(frozen=True, slots=True)
class Rules:
    """The daemon's limits; the defaults are its own."""

    max_line_bytes: int = 5 << 20  # PLUGIN_STDIO_MAX_BUFFER_SIZE
    silence_s: float = 120.0  # without a line on stdout or stderr
    ready_s: float = 120.0  # until the first heartbeat
    request_s: float = 600.0  # PLUGIN_MAX_EXECUTION_TIMEOUT
    stream_buffer: int = 512  # messages of one session that nobody has read yet; a full one blocks all sessions
    stderr_bytes: int = 16 << 10


class PluginError(Exception):
    """The plugin answered with an error. `kind` is Dify's error class, as in InvokeBadRequestError."""

    def __init__(self, kind: str, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.kind = kind
        self.details = details


class PluginCrashed(Exception):
    """The process ended, or was killed for breaking a rule, while a request was open or before it was ready."""


class RequestTimeout(Exception):
    """The daemon's own time limit for a request."""


_END = object()


@dataclass(slots=True, eq=False)
class Session:
    """One request: iterate for its answers, close to stop listening (the plugin is not told)."""

    daemon: Daemon
    number: str
    buffer: int
    sent_at: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)  # time.perf_counter() of every answer
    closed: bool = False
    _messages: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)

    def put(self, message: object) -> None:
        """Called by the reading thread; waits while the buffer is full, and so do all other sessions."""
        while self._messages.qsize() >= self.buffer and not (self.closed or self.daemon.is_over):
            time.sleep(0.001)
        if not self.closed:
            self._messages.put(message)

    def fail(self, error: Exception) -> None:
        self._messages.put(error)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        deadline = self.sent_at + self.daemon.rules.request_s
        try:
            while not self.closed:
                message = self._next(deadline)
                if message is _END:
                    return
                if isinstance(message, Exception):
                    raise message
                yield message
        finally:
            self.close()

    def _next(self, deadline: float) -> Any:
        try:
            return self._messages.get(timeout=max(deadline - time.perf_counter(), 0))
        except queue.Empty:
            raise RequestTimeout(f"killed by timeout: {self.daemon.rules.request_s:g} s") from None

    def close(self) -> None:
        self.closed = True
        self.daemon.forget(self)


class Daemon:
    """One plugin process. Use as a context manager: entering waits for the first heartbeat.

    `folder` holds the plugin; `env` is added to this process's environment; `credentials` is the saved form.
    Raises PluginCrashed when the plugin does not become ready.
    """

    def __init__(
        self,
        folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        credentials: Mapping[str, Any] | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.rules = rules or Rules()
        self.credentials = dict(credentials or {})
        self.manifest: dict[str, Any] = {}
        self.heartbeats: list[float] = []  # time.monotonic()
        self.logs: list[dict[str, Any]] = []
        self.errors: list[Any] = []  # error events that name no open session
        self.noise: list[str] = []  # lines on stdout that are not messages
        self.longest_line = 0  # bytes
        self.killed_for: str | None = None
        self.open_at_crash: list[str] = []
        self.dropped = 0  # messages for sessions that nobody listens to any more
        self._sessions: dict[str, Session] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of the sessions
        self._stdin_lock = threading.Lock()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self.stopping = False
        self._stderr: deque[bytes] = deque()
        self.started_at = self._last_activity = time.monotonic()
        self.process = _start(folder, env or {})
        self._stdin, self._stdout, self._stderr_pipe = _pipes(self.process)
        for work in (self._read_stdout, self._read_stderr, self._watch):
            threading.Thread(target=work, name=f"daemon{work.__name__}", daemon=True).start()

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def wait_until_ready(self) -> float:
        """Seconds from the start to the first heartbeat."""
        if not self._ready.wait(self.rules.ready_s):
            raise PluginCrashed(f"no heartbeat within {self.rules.ready_s:g} s; {self._last_words()}")
        if not self.heartbeats:
            raise PluginCrashed(f"the plugin ended before it was ready; {self._last_words()}")
        return self.heartbeats[0] - self.started_at

    def kill(self) -> None:
        """SIGKILL, as the daemon stops a plugin."""
        self.stopping = True
        self.process.kill()
        self.process.wait()
        self._ended.wait(5)
        with contextlib.suppress(OSError):
            self._stdin.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_over(self) -> bool:
        """The process was stopped, or killed for breaking a rule; its open sessions are about to fail."""
        return self.stopping or self.killed_for is not None

    @property
    def stderr_tail(self) -> str:
        return b"".join(self._stderr).decode(errors="replace")

    @property
    def longest_heartbeat_gap(self) -> float:
        """Seconds, from the first heartbeat to now."""
        beats = [*self.heartbeats, time.monotonic()]
        return max(later - earlier for earlier, later in itertools.pairwise(beats)) if self.heartbeats else float("inf")

    def invoke_llm(
        self,
        messages: Sequence[Mapping[str, Any]],
        parameters: Mapping[str, Any] | None = None,
        *,
        model: str = "demo",
        stop: Sequence[str] | None = None,
        stream: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        credentials: Mapping[str, Any] | None = None,
    ) -> Session:
        """Iterate over the answer's chunks (Dify's LLMResultChunk as a dict)."""
        data = self._model_request("invoke_llm", model, credentials) | {
            "prompt_messages": list(messages),
            "model_parameters": dict(parameters or {}),
            "stop": list(stop) if stop is not None else None,
            "tools": list(tools or ()),
            "stream": stream,
        }
        return self.send(data, buffer=self.rules.stream_buffer)

    def num_tokens(self, messages: Sequence[Mapping[str, Any]], *, model: str = "demo") -> int:
        data = self._model_request("get_llm_num_tokens", model, None)
        return int(self.ask(data | {"prompt_messages": list(messages), "tools": []})["num_tokens"])

    def validate_provider(self, credentials: Mapping[str, Any]) -> dict[str, Any]:
        action = {"type": "model", "action": "validate_provider_credentials", "user_id": "user", "provider": PROVIDER}
        return self.ask(action | {"credentials": dict(credentials)})

    def schema(self, model: str = "demo") -> dict[str, Any]:
        """The model's declaration as Dify reads it."""
        return self.ask(self._model_request("get_ai_model_schemas", model, None))

    def ask(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request that has one answer."""
        (answer,) = self.send(data, buffer=1)
        return answer

    def send(self, data: Mapping[str, Any], *, buffer: int) -> Session:
        """Write one request line. Raises PluginCrashed when there is no process to write to."""
        session = Session(self, f"session-{next(self._numbers)}", buffer)
        line = json.dumps(_envelope(session.number, data), separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._sessions[session.number] = session
        try:
            with self._stdin_lock:
                session.sent_at = time.perf_counter()
                self._stdin.write(line)
                self._stdin.flush()
        except (OSError, ValueError):  # a broken or a closed pipe
            self.forget(session)
            raise PluginCrashed(f"the plugin is not running; {self._last_words()}") from None
        if self._ended.is_set():  # it ended after the session was registered, perhaps before `_fail_open_sessions`
            session.fail(PluginCrashed(f"the plugin is not running; {self._last_words()}"))
        return session

    def forget(self, session: Session) -> None:
        with self._lock:
            self._sessions.pop(session.number, None)

    def _model_request(self, action: str, model: str, credentials: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "user_id": "user",
            "type": "model",
            "action": action,
            "provider": PROVIDER,
            "model": model,
            "model_type": "llm",
            "credentials": dict(self.credentials if credentials is None else credentials),
        }

    def _read_stdout(self) -> None:
        """The daemon's reader: one thread for all sessions, so a full one holds up the others."""
        limit = self.rules.max_line_bytes
        while line := self._stdout.readline(limit + 1):
            self._last_activity = time.monotonic()
            self.longest_line = max(self.longest_line, len(line))
            if len(line) > limit:
                self._kill_for(f"a line on stdout is longer than {limit} bytes")
                break
            if line != b"\n":
                self._dispatch(line)
        self._fail_open_sessions()
        self._stdout.close()

    def _dispatch(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            self.noise.append(line[:200].decode(errors="replace"))
            return
        event = message.get("event", "manifest")
        match event:
            case "session":
                self._deliver(message["session_id"], message["data"])
            case "heartbeat":
                self.heartbeats.append(time.monotonic())
                self._ready.set()
            case "log":
                self.logs.append(message["data"])
            case "manifest" if not self.manifest:
                self.manifest = message
            case "error" if message.get("session_id"):
                self._deliver(message["session_id"], {"type": "error", "data": message["data"]})
            case _:
                self.errors.append(message)

    def _deliver(self, number: str, data: dict[str, Any]) -> None:
        session = self._sessions.get(number)
        if session is None:
            self.dropped += 1
            return
        match data["type"]:
            case "stream":
                session.arrivals.append(time.perf_counter())
                session.put(data["data"])
            case "error":
                session.put(_plugin_error(data["data"]))
            case "end":
                session.put(_END)

    def _fail_open_sessions(self) -> None:
        self.process.kill()  # stdout is closed or unreadable: the daemon's runtime ends with it
        self.process.wait()
        self._ended.set()
        with self._lock:
            sessions = list(self._sessions.values())
        if not self.stopping:
            self.open_at_crash = [session.number for session in sessions]
        for session in sessions:
            session.fail(PluginCrashed(f"the plugin ended while the request was open; {self._last_words()}"))
        self._ready.set()

    def _read_stderr(self) -> None:
        kept = 0
        while data := self._stderr_pipe.read1(1 << 16):
            self._last_activity = time.monotonic()
            self._stderr.append(data)
            kept += len(data)
            while kept - len(self._stderr[0]) >= self.rules.stderr_bytes:
                kept -= len(self._stderr.popleft())
        self._stderr_pipe.close()

    def _watch(self) -> None:
        while not self._ended.wait(min(self.rules.silence_s / 4, 1)):
            if time.monotonic() - self._last_activity > self.rules.silence_s:
                self._kill_for(f"it was silent for {self.rules.silence_s:g} s")
                return

    def _kill_for(self, reason: str) -> None:
        self.killed_for = reason
        self.process.kill()

    def _last_words(self) -> str:
        if self.killed_for:
            return f"the daemon killed it: {self.killed_for}"
        lines = self.stderr_tail.strip().splitlines()
        return f"exit code {self.process.poll()}, its last words: {' | '.join(lines[-3:]) or 'none'}"


def _start(folder: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    if os.getpid() == 1:
        raise PluginCrashed("a plugin ends when its parent is process 1, as here; start the container with --init")
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, "-m", "main"],
        cwd=folder,
        env=inherited | {"INSTALL_METHOD": "local"} | dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for this process, which then kills the plugin
    )


def _pipes(process: subprocess.Popen[bytes]) -> tuple[BufferedWriter, BufferedReader, BufferedReader]:
    assert isinstance(process.stdin, BufferedWriter)
    assert isinstance(process.stdout, BufferedReader)
    assert isinstance(process.stderr, BufferedReader)
    return process.stdin, process.stdout, process.stderr


def _envelope(number: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "session_id": number,
        "tenant_id": "tenant",
        "conversation_id": None,
        "message_id": None,
        "app_id": None,
        "endpoint_id": None,
        "context": {},
        "event": "request",
        "data": data,
    }


def _plugin_error(data: Mapping[str, Any]) -> PluginError:
    message = str(data.get("message") or data.get("error") or data)
    return PluginError(str(data.get("error_type", "Error")), message, data.get("args") or {})
