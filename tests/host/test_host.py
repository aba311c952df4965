from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgpack  # type: ignore[import-untyped]
import pytest

from engine import wire
from engine.config import EngineConfig
from engine.errors import EngineError, EngineStopped, InvalidConfig, InvalidRequest
from engine.host import BUSY_STREAMS, MERGE_EVERY, Outbox
from engine.request import Chunk, Message, Request, SamplingParams, Text
from tests.host.fake_engine import COMMAND

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Raw:
    """A host and the bare socket to it."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    frames: IO[bytes]

    def send(self, message: wire.Query) -> None:
        self.connection.sendall(wire.encode(message))

    def send_plain(self, plain: Any) -> None:
        payload = msgpack.packb(plain)
        self.connection.sendall(struct.pack("<I", len(payload)) + payload)

    def receive(self) -> wire.Answer | None:
        payload = wire.read_frame(self.frames)
        return None if payload is None else wire.decode_answer(payload)

    def receive_error(self) -> tuple[int, EngineError]:
        answer = self.receive()
        assert isinstance(answer, wire.Replies)
        ((number, error),) = answer.replies
        assert isinstance(error, EngineError)
        return number, error


@pytest.fixture
def raw(_no_leaks: None) -> Iterator[Raw]:
    ours, theirs = socket.socketpair()
    lifeline, our_lifeline = os.pipe()
    process = subprocess.Popen(
        [*COMMAND, str(theirs.fileno()), str(lifeline)],
        pass_fds=(theirs.fileno(), lifeline),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    theirs.close()
    os.close(lifeline)
    with process, ours, ours.makefile("rb") as frames:
        yield Raw(process, ours, frames)
        process.kill()
    os.close(our_lifeline)


@pytest.fixture
def ready(raw: Raw, config: EngineConfig) -> Raw:
    raw.send(wire.Hello(config.to_mapping()))
    assert raw.receive() == wire.Ready(raw.process.pid)
    return raw


def last_line(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr is not None
    return process.stderr.read().decode().splitlines()[-1]


def test_a_malformed_frame_ends_the_host_and_is_logged(ready: Raw) -> None:
    ready.connection.sendall(struct.pack("<I", 3) + b"\xc1\xc1\xc1")
    assert ready.receive() is None
    assert ready.process.wait(10) == 1
    assert "not MessagePack" in last_line(ready.process)


def test_an_oversized_frame_ends_the_host(ready: Raw) -> None:
    ready.connection.sendall(struct.pack("<I", 0xFFFFFFFF))
    assert ready.process.wait(10) == 1
    assert "at most" in last_line(ready.process)


def test_a_connection_that_ends_inside_a_frame_ends_the_host(ready: Raw) -> None:
    ready.connection.sendall(struct.pack("<I", 100) + b"half")
    ready.connection.shutdown(socket.SHUT_WR)
    assert ready.process.wait(10) == 1


def test_a_client_that_leaves_ends_the_host(ready: Raw) -> None:
    ready.connection.shutdown(socket.SHUT_WR)
    assert ready.process.wait(10) == 0


def test_a_client_that_leaves_without_a_word_ends_the_host(raw: Raw) -> None:
    raw.connection.shutdown(socket.SHUT_WR)
    assert raw.process.wait(10) == 0


def test_a_malformed_request_fails_alone(ready: Raw) -> None:
    ready.send_plain([wire.Kind.SUBMIT, 7, "words", [["user", [12]]], {}, None])
    number, error = ready.receive_error()
    assert (number, type(error)) == (7, InvalidRequest)
    ready.send(wire.Count(8, "m", (Message("user", (Text("four"),)),)))
    assert ready.receive() == wire.Replies(((8, 4),))


@pytest.mark.parametrize(
    ("hello", "error", "said"),
    [
        ([wire.Kind.HELLO, 99, {}], EngineStopped, "version 99"),
        ([wire.Kind.HELLO, wire.VERSION, {"colour": "red"}], InvalidConfig, "colour"),
        ([wire.Kind.CANCEL, 1], EngineStopped, "first message must be Hello"),
        (["hello"], EngineStopped, "not a message"),
    ],
)
def test_a_wrong_greeting_is_answered_with_why(raw: Raw, hello: Any, error: type[EngineError], said: str) -> None:
    raw.send_plain(hello)
    number, refusal = raw.receive_error()
    assert (number, type(refusal)) == (wire.CONNECTION, error)
    assert said in str(refusal)
    assert raw.process.wait(10) == 1


def test_tokens_that_come_faster_than_they_are_read_share_frames(ready: Raw) -> None:
    tokens = 100_000
    for number in range(1, 5):
        sampling = SamplingParams(max_tokens=tokens)
        ready.send(wire.Submit(number, Request("words", (Message("user", (Text("hi"),)),), sampling)))
    open_numbers, texts, frames = {1, 2, 3, 4}, dict.fromkeys(range(1, 5), ""), 0
    ready.send(wire.StatusQuery(9))
    while open_numbers:
        answer = ready.receive()
        frames += 1
        assert isinstance(answer, wire.Replies)
        for number, reply in answer.replies:
            if isinstance(reply, Chunk):
                texts[number] += reply.text
            elif number != 9:
                open_numbers.discard(number)
    assert all(text == "".join(f"{index} " for index in range(tokens)) for text in texts.values())
    assert frames < tokens / 4


def test_the_outbox_holds_one_chunk_per_request_however_many_tokens_wait() -> None:
    outbox = Outbox()
    for index in range(10 * MERGE_EVERY):
        outbox.put(1, Chunk(f"{index} ", 1))
        outbox.put(2, Chunk("x", 1))
    assert all(len(replies) < MERGE_EVERY for replies in outbox._waiting.values())
    outbox.put(2, EngineError("it failed"))
    (first, _), (second, chunk), (third, error) = outbox.take().replies
    assert (first, second, third) == (1, 2, 2)
    assert chunk == Chunk("x" * 10 * MERGE_EVERY, 10 * MERGE_EVERY)
    assert isinstance(error, EngineError)


def test_on_a_busy_line_what_a_request_waits_for_leaves_at_once_and_the_rest_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.host.PACE_S", 3600.0)
    outbox, busy = Outbox(), range(BUSY_STREAMS + 1)
    for number in busy:
        outbox.put(number, Chunk("a", 1))
    assert [number for number, _ in outbox.take().replies] == [*busy]
    with ThreadPoolExecutor(1) as writer:
        taken = writer.submit(outbox.take)
        for number in busy:
            outbox.put(number, Chunk("b", 1))
        assert not wait([taken], 0.1).done
        outbox.put(99, Chunk("first", 1))
        outbox.put(0, Chunk("c", 1))
        outbox.put(0, EngineError("last"))
        replies = [*taken.result(10).replies]
    while {number for number, _ in replies} != {99, 0}:
        replies += outbox.take().replies
    assert [number for number, _ in replies].count(99) == 1
    assert next(reply for number, reply in replies if number == 0) == Chunk("bc", 2)
