from __future__ import annotations

import io
import random
import struct

import msgpack  # type: ignore[import-untyped]
import pytest

from engine import wire
from engine.config import EngineConfig
from engine.errors import ContextOverflow, EngineError, InvalidParameter, InvalidRequest
from engine.request import (
    Chunk,
    Finished,
    Image,
    ImageUrl,
    Message,
    Request,
    SamplingParams,
    Text,
    Timings,
    Tool,
    ToolCall,
    Usage,
    Video,
    VideoUrl,
)

MESSAGES = (
    Message("system", (Text("Answer in one word."),)),
    Message("user", (Image(bytes(range(256))), Text("Was ist das? 是什么 \ud800"), Image(b""))),
    Message("user", (ImageUrl("https://example.com/a.png?sign=1"), ImageUrl("https://x", "low"), Image(b"x", "low"))),
    Message("user", (Video(b"x"), VideoUrl("https://example.com/a.mp4?sign=1"))),
)
REQUEST = Request(
    "demo", MESSAGES, SamplingParams(temperature=0.5, seed=2**63 - 1, stop=("\n", "END"), max_tokens=7), timeout_s=1.5
)
TOOL = Tool("clock", "what time it is", '{"type": "object", "properties": {"zone": {"type": "string"}}}')
CONVERSATION = (
    Message("user", (Text("what time is it?"),)),
    Message("assistant", (), (ToolCall("clock", '{"zone": "UTC"}', "1"),)),
    Message("tool", (Text("noon"),), tool_call_id="1"),
)
FINISHED = Finished("stop", Usage(5, 4, 3, 2), Timings(0.1, 0.2, 0.3, 0.4, 0.5), from_cache=True)


def payload(message: wire.Query | wire.Answer) -> bytes:
    frame = wire.read_frame(io.BytesIO(wire.encode(message)))
    assert frame is not None
    return frame


@pytest.mark.parametrize(
    "query",
    [
        wire.Hello(EngineConfig().to_mapping()),
        wire.Submit(1, REQUEST),
        wire.Submit(2, Request("m", (Message("user", (Text("hi"),)),))),
        wire.Submit(3, Request("m", CONVERSATION, tools=(TOOL, Tool("bare")), enable_thinking=False)),
        wire.Count(4, "m", CONVERSATION, (TOOL,)),
        wire.Cancel(3),
        wire.Count(4, "demo", MESSAGES),
        wire.StatusQuery(5),
        wire.Pull(6, "owner/name"),
        wire.Close(),
    ],
)
def test_a_query_survives_the_line(query: wire.Query) -> None:
    assert wire.decode_query(payload(query)) == query


def test_an_answer_survives_the_line() -> None:
    called = Chunk("", 2, (ToolCall("clock", '{"zone": "ü"}', "7"), ToolCall("clock", "{}")))
    replies = (
        (1, Chunk("á \ud83d", 3)),
        (5, called),
        (1, FINISHED),
        (2, 17),
        (3, {"memory": {"kv": 1.5}, "models": ["demo"]}),
    )
    assert wire.decode_answer(payload(wire.Ready(4711))) == wire.Ready(4711)
    assert wire.decode_answer(payload(wire.Replies(replies))) == wire.Replies(replies)


def test_an_error_keeps_its_class_and_message() -> None:
    answer = wire.decode_answer(payload(wire.Replies(((9, ContextOverflow("too long")),))))
    assert isinstance(answer, wire.Replies)
    ((number, error),) = answer.replies
    assert (number, type(error), str(error)) == (9, ContextOverflow, "too long")


def test_images_travel_as_raw_bytes() -> None:
    image = random.Random(0).randbytes(100_000)
    frame = wire.encode(wire.Submit(1, Request("m", (Message("user", (Image(image),)),))))
    assert image in frame
    assert len(frame) < len(image) + 400


def test_neighbouring_chunks_are_joined_and_nothing_else() -> None:
    merged = wire.merge_chunks([Chunk("a", 1), Chunk("", 1), Chunk("b", 2), FINISHED, 3])
    assert merged == [Chunk("ab", 4), FINISHED, 3]


def test_joined_chunks_keep_their_calls_of_tools() -> None:
    one, two = ToolCall("clock", "{}"), ToolCall("calendar", "{}")
    merged = wire.merge_chunks([Chunk("a", 1, (one,)), Chunk("b", 2), Chunk("", 3, (two,))])
    assert merged == [Chunk("ab", 6, (one, two))]


def test_frames_are_read_one_after_the_other() -> None:
    stream = io.BytesIO(wire.encode(wire.Cancel(1)) + wire.encode(wire.Cancel(2)))
    frames = [wire.read_frame(stream) for _ in range(3)]
    assert [frame and wire.decode_query(frame) for frame in frames] == [wire.Cancel(1), wire.Cancel(2), None]


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_a_frame_cut_short_is_an_error(size: int) -> None:
    with pytest.raises(wire.ProtocolError, match="ended"):
        wire.read_frame(io.BytesIO(wire.encode(wire.Cancel(1))[:size]))


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(wire.ProtocolError, match="at most"):
        wire.read_frame(io.BytesIO(struct.pack("<I", wire.MAX_FRAME_BYTES + 1)))


def test_an_oversized_request_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 1 << 20)
    request = Request("m", (Message("user", (Image(bytes(2 << 20)),)),))
    with pytest.raises(InvalidRequest, match="has 2 MiB; at most 1 MiB"):
        wire.encode(wire.Submit(1, request))


def test_a_value_that_is_not_plain_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        wire.encode(wire.Submit(1, Request("m", (Message("user", (Image(object()),)),))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [],
        {},
        "text",
        [wire.Kind.SUBMIT],
        [wire.Kind.CANCEL, "1"],
        [wire.Kind.CANCEL, 1, 2],
        [wire.Kind.STATUS_QUERY],
        [wire.Kind.HELLO],
        [wire.Kind.HELLO, wire.VERSION, []],
        [wire.Kind.READY, wire.VERSION, 1],
        [99, 1],
    ],
)
def test_what_no_client_sends_is_a_protocol_error(plain: object) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.decode_query(msgpack.packb(plain))


@pytest.mark.parametrize(
    "plain",
    [
        [wire.Kind.REPLIES, 1],
        [wire.Kind.REPLIES, [[]]],
        [wire.Kind.REPLIES, [[wire.Kind.CHUNK, 1, b"bytes", 1]]],
        [wire.Kind.REPLIES, [[wire.Kind.FINISHED, 1, "stop", [1, 2, 3], [0.0] * 5, False]]],
        [wire.Kind.REPLIES, [[wire.Kind.FINISHED, 1, "stop", [1, 2, 3, "4"], [0.0] * 5, False]]],
        [wire.Kind.REPLIES, [[wire.Kind.FINISHED, 1, "tired", [1, 2, 3, 4], [0.0] * 5, False]]],
        [wire.Kind.READY, wire.VERSION],
        [wire.Kind.CLOSE],
    ],
)
def test_what_no_host_sends_is_a_protocol_error(plain: object) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.decode_answer(msgpack.packb(plain))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([], InvalidRequest),
        (["m", [], {}, None, [], None], InvalidRequest),
        (["m", [["user", ["hi"], [], ""]], {"temperature": -1}, None, [], None], InvalidParameter),
        (["m", [["user", ["hi"], [], ""]], {"warmth": 1}, None, [], None], InvalidRequest),
        (["m", [["user", ["hi"], [], ""]], {"stop": 5}, None, [], None], InvalidRequest),
        (["m", [["robot", ["hi"], [], ""]], {}, None, [], None], InvalidRequest),
        (["m", [["user", [5], [], ""]], {}, None, [], None], InvalidRequest),
        (["m", [["user", ["hi"], [], ""]], {}, "soon", [], None], InvalidRequest),
        (["m", [["user", ["hi"], [["name"]], ""]], {}, None, [], None], InvalidRequest),
        (["m", [["user", ["hi"], [], ""]], {}, None, [["name", "what it is", "no JSON"]], None], InvalidParameter),
        (["m", [["user", ["hi"], [], ""]], {}, None, [], "yes"], InvalidParameter),
        (["m", {"user": "hi"}, {}, None, [], None], InvalidRequest),
    ],
)
def test_a_malformed_request_fails_alone(content: list[object], error: type[EngineError]) -> None:
    query = wire.decode_query(msgpack.packb([wire.Kind.SUBMIT, 12, *content]))
    assert isinstance(query, wire.Malformed)
    assert (query.number, type(query.error)) == (12, error)


def test_another_version_is_refused_whatever_follows_it() -> None:
    with pytest.raises(wire.ProtocolError, match=r"version 99 .* restart"):
        wire.decode_query(msgpack.packb([wire.Kind.HELLO, 99, "unheard of", 5]))
    with pytest.raises(wire.ProtocolError, match="version None"):
        wire.decode_answer(msgpack.packb([wire.Kind.READY, None]))


def test_random_bytes_are_a_protocol_error_or_a_message() -> None:
    rng = random.Random(1)
    samples = [rng.randbytes(rng.randrange(40)) for _ in range(3000)]
    valid = payload(wire.Submit(1, REQUEST))
    for _ in range(3000):
        broken = bytearray(valid)
        broken[rng.randrange(len(broken))] = rng.randrange(256)
        samples.append(bytes(broken))
    samples.append(b"\x91" * 100_000)
    for sample in samples:
        for decode in (wire.decode_query, wire.decode_answer):
            try:
                decode(sample)
            except wire.ProtocolError:
                continue
