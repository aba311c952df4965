"""The message format between the protocol process and the engine's process.

A frame is a little-endian 32-bit length and that many bytes of MessagePack: an array whose first item is a `Kind`.
Images and videos travel as raw bytes. Both ends come from the same folder, so a version that differs means that files
changed under a running process: it is an error, never a negotiation.

    client -> host   Hello, then any of Submit, Cancel, Count, StatusQuery, Pull, Close
    host -> client   Ready once, then Replies: everything that happened since the last frame, for all requests

The client numbers its requests from 1; number 0 in Replies is the connection itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from operator import attrgetter
from typing import IO, Any

import msgpack  # type: ignore[import-untyped]

from engine.errors import EngineError, InvalidRequest, error_from_code
from engine.request import Chunk, Finished, Message, Request, SamplingParams, Timings, Tool, ToolCall, Usage
from engine.wire_parts import part_from_plain, part_to_plain

VERSION = 4
MAX_FRAME_BYTES = 512 << 20
CONNECTION = 0  # the number that stands for the connection, not for a request

_LENGTH = struct.Struct("<I")
_USAGE = attrgetter(*(field.name for field in fields(Usage)))
_TIMINGS = attrgetter(*(field.name for field in fields(Timings)))


class ProtocolError(Exception):
    """The other end sent something that is not this protocol, or not this version of it."""


class Kind(IntEnum):
    """The first item of a frame, and of a reply in Replies."""

    HELLO = 0
    SUBMIT = 1
    CANCEL = 2
    COUNT = 3
    STATUS_QUERY = 4
    CLOSE = 5
    READY = 6
    REPLIES = 7
    CHUNK = 8
    FINISHED = 9
    ERROR = 10
    TOKENS = 11
    STATUS = 12
    PULL = 13


@dataclass(frozen=True, slots=True)
class Hello:
    """The client's first message. `config` is EngineConfig.to_mapping()."""

    config: dict[str, Any]
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Submit:
    number: int
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    number: int


@dataclass(frozen=True, slots=True)
class Count:
    """How many tokens are these messages?"""

    number: int
    model: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class StatusQuery:
    number: int


@dataclass(frozen=True, slots=True)
class Pull:
    """Start the download of a model that is not there; the reply says how far it is (see Engine.pull)."""

    number: int
    model: str


@dataclass(frozen=True, slots=True)
class Close:
    """The client wants the engine to end."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Decoded from a Submit or Count whose content is wrong: only that request fails."""

    number: int
    error: EngineError


@dataclass(frozen=True, slots=True)
class Ready:
    """The host's first message: the engine is built."""

    pid: int
    version: int = VERSION


Reply = Chunk | Finished | EngineError | int | dict[str, Any]
"""For a Submit: chunks, then one Finished or error. For a Count: an int. For StatusQuery and Pull: plain values."""


@dataclass(frozen=True, slots=True)
class Replies:
    """(number, reply) in the order they happened."""

    replies: tuple[tuple[int, Reply], ...]


Query = Hello | Submit | Cancel | Count | StatusQuery | Pull | Close
Answer = Ready | Replies


def merge_chunks(replies: Iterable[Reply]) -> list[Reply]:
    """Join neighbouring chunks of one stream into one; everything else keeps its place."""
    merged: list[Reply] = []
    chunks: list[Chunk] = []
    for reply in replies:
        if isinstance(reply, Chunk):
            chunks.append(reply)
            continue
        if chunks:
            merged.append(_joined(chunks))
            chunks = []
        merged.append(reply)
    if chunks:
        merged.append(_joined(chunks))
    return merged


def _joined(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    calls = tuple(call for chunk in chunks for call in chunk.tool_calls)
    return Chunk("".join([chunk.text for chunk in chunks]), sum(chunk.tokens for chunk in chunks), calls)


def read_frame(stream: IO[bytes]) -> bytes | None:
    """One frame's payload; None when the other end closed between two frames.

    Raises ProtocolError for a frame that is cut short or over MAX_FRAME_BYTES.
    """
    header = stream.read(_LENGTH.size)
    if not header:
        return None
    if len(header) < _LENGTH.size:
        raise ProtocolError("the connection ended inside a frame's length")
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {length} bytes was announced; at most {MAX_FRAME_BYTES} are allowed")
    payload = stream.read(length)
    if len(payload) < length:
        raise ProtocolError(f"the connection ended after {len(payload)} of a frame's {length} bytes")
    return payload


def encode(message: Query | Answer) -> bytes:
    """The message as a whole frame. Raises InvalidRequest when it is too large or holds a value that is not plain."""
    try:
        payload: bytes = msgpack.packb(_message_to_plain(message), unicode_errors="surrogatepass")
    except (AttributeError, TypeError, ValueError, OverflowError) as problem:
        raise InvalidRequest(f"the request holds a value that cannot be sent to the engine: {problem}") from None
    if len(payload) > MAX_FRAME_BYTES:
        raise InvalidRequest(
            f"the request has {len(payload) >> 20} MiB; at most {MAX_FRAME_BYTES >> 20} MiB can be sent to the engine: "
            "send fewer or smaller images"
        )
    return _LENGTH.pack(len(payload)) + payload


def decode_query(payload: bytes) -> Query | Malformed:
    """What a client sent. Raises ProtocolError for anything else, and for a Hello of another version."""
    match _unpack(payload):
        case [Kind.HELLO, version, *rest]:
            _require_version(version)
            match rest:
                case [dict(config)]:
                    return Hello(config)
        case [Kind.SUBMIT, int(number), *content]:
            return _content(number, lambda: Submit(number, _request(content)))
        case [Kind.CANCEL, int(number)]:
            return Cancel(number)
        case [Kind.COUNT, int(number), str(model), messages, tools]:
            return _content(number, lambda: Count(number, model, _messages(messages), _tools(tools)))
        case [Kind.STATUS_QUERY, int(number)]:
            return StatusQuery(number)
        case [Kind.PULL, int(number), str(model)]:
            return Pull(number, model)
        case [Kind.CLOSE]:
            return Close()
    raise ProtocolError(f"not a message of a client: {_excerpt(payload)}")


def decode_answer(payload: bytes) -> Answer:
    """What a host sent. Raises ProtocolError for anything else, and for a Ready of another version."""
    match _unpack(payload):
        case [Kind.READY, version, *rest]:
            _require_version(version)
            match rest:
                case [int(pid)]:
                    return Ready(pid)
        case [Kind.REPLIES, list(entries)]:
            return Replies(tuple(_reply(entry) for entry in entries))
    raise ProtocolError(f"not a message of a host: {_excerpt(payload)}")


def _message_to_plain(message: Query | Answer) -> list[Any]:
    match message:
        case Hello():
            return [Kind.HELLO, message.version, message.config]
        case Submit(number, request):
            sampling, tools = asdict(request.sampling), _plain_tools(request.tools)
            messages, thinking = _plain(request.messages), request.enable_thinking
            return [Kind.SUBMIT, number, request.model, messages, sampling, request.timeout_s, tools, thinking]
        case Cancel():
            return [Kind.CANCEL, message.number]
        case Count():
            return [Kind.COUNT, message.number, message.model, _plain(message.messages), _plain_tools(message.tools)]
        case StatusQuery():
            return [Kind.STATUS_QUERY, message.number]
        case Pull():
            return [Kind.PULL, message.number, message.model]
        case Close():
            return [Kind.CLOSE]
        case Ready():
            return [Kind.READY, message.version, message.pid]
        case Replies():
            return [Kind.REPLIES, [_reply_to_plain(number, reply) for number, reply in message.replies]]


def _plain(messages: tuple[Message, ...]) -> list[Any]:
    return [[m.role, [part_to_plain(part) for part in m.parts], _plain_calls(m), m.tool_call_id] for m in messages]


def _plain_calls(holder: Message | Chunk) -> list[list[str]]:
    return [[call.name, call.arguments, call.id] for call in holder.tool_calls]


def _plain_tools(tools: tuple[Tool, ...]) -> list[list[str]]:
    return [[tool.name, tool.description, tool.parameters] for tool in tools]


def _reply_to_plain(number: int, reply: Reply) -> list[Any]:
    # int() and float(): an engine that counts with numpy scalars must not break the line
    match reply:
        case Chunk(text, tokens):
            return [Kind.CHUNK, number, text, int(tokens), *_plain_calls(reply)]
        case Finished(reason, usage, timings, from_cache):
            counts = [int(count) for count in _USAGE(usage)]
            seconds = [float(value) for value in _TIMINGS(timings)]
            return [Kind.FINISHED, number, reason, counts, seconds, bool(from_cache)]
        case EngineError():
            return [Kind.ERROR, number, reply.code, str(reply)]
        case dict():
            return [Kind.STATUS, number, reply]
        case _:
            return [Kind.TOKENS, number, int(reply)]


def _reply(entry: Any) -> tuple[int, Reply]:
    match entry:
        case [Kind.CHUNK, int(number), str(text), int(tokens), *calls]:
            return number, Chunk(text, tokens, _calls(calls))
        case [Kind.FINISHED, int(number), "stop" | "length" as reason, [*counts], [*seconds], bool(from_cache)]:
            plain = all(isinstance(value, int | float) for value in (*counts, *seconds))
            if plain and len(counts) == 4 and len(seconds) == 5:
                return number, Finished(reason, Usage(*counts), Timings(*seconds), from_cache)
        case [Kind.ERROR, int(number), str(code), str(message)]:
            return number, error_from_code(code, message)
        case [Kind.TOKENS, int(number), int(tokens)]:
            return number, tokens
        case [Kind.STATUS, int(number), dict(status)]:
            return number, status
    raise ProtocolError(f"not a reply: {str(entry)[:200]}")


def _content(number: int, build: Callable[[], Submit | Count]) -> Submit | Count | Malformed:
    try:
        return build()
    except EngineError as error:
        return Malformed(number, error)
    except (TypeError, ValueError) as problem:
        return Malformed(number, InvalidRequest(f"the request is malformed: {problem}"))


def _request(content: list[Any]) -> Request:
    match content:
        case [str(model), messages, dict(sampling), None | int() | float() as timeout_s, tools, thinking]:
            params = SamplingParams(stop=tuple(sampling.pop("stop", ())), **sampling)
            return Request(model, _messages(messages), params, timeout_s, _tools(tools), thinking)
    raise InvalidRequest(f"the request is malformed: {len(content)} fields, or one of a wrong type")


def _messages(plain: Any) -> tuple[Message, ...]:
    if not isinstance(plain, list):
        raise InvalidRequest("the request is malformed: its messages are not a list")
    return tuple(_message(item) for item in plain)


def _message(plain: Any) -> Message:
    match plain:
        case ["system" | "user" | "assistant" | "tool" as role, list(parts), list(calls), str(call_id)]:
            return Message(role, tuple(part_from_plain(part) for part in parts), _calls(calls), call_id)
    raise InvalidRequest("the request is malformed: a message needs a role (system, user, assistant or tool) and parts")


def _calls(plain: list[Any]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(*_texts(call)) for call in plain)


def _tools(plain: Any) -> tuple[Tool, ...]:
    return tuple(Tool(*_texts(tool)) for tool in (plain if isinstance(plain, list) else [plain]))


def _texts(plain: Any) -> list[str]:
    match plain:
        case [str(name), str(second), str(third)]:
            return [name, second, third]
    raise InvalidRequest(f"the request is malformed: a tool, or a call of one, is three texts, not {str(plain)[:200]}")


def _require_version(version: Any) -> None:
    if version != VERSION:
        raise ProtocolError(
            f"the other end speaks version {version!r} of the engine's protocol, this one {VERSION}: "
            "the plugin's files changed while it ran; restart it"
        )


def _unpack(payload: bytes) -> Any:
    try:
        return msgpack.unpackb(payload, unicode_errors="surrogatepass")
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as problem:
        raise ProtocolError(f"not MessagePack ({type(problem).__name__} {problem}): {_excerpt(payload)}") from None


def _excerpt(payload: bytes) -> str:
    return f"{len(payload)} bytes starting with {payload[:32]!r}"
