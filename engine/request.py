"""What a caller asks of the engine and what comes back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from engine.errors import InvalidParameter, InvalidRequest, InvalidVideo

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length"]
Detail = Literal["low", "high"]  # of an image: fewer tokens where the model's processor has a choice, or all it makes
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
MAX_TOOLS = 256
MAX_VIDEO_MIB = 256  # of a file; Dify takes 100 unless it is told otherwise
MAX_STOP_WORDS = 16
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded image file (JPEG, PNG, ...), not pixels."""

    data: bytes = field(repr=False)
    detail: Detail = "high"


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """An image that the engine fetches first. The URL may hold a signature: no message quotes its query."""

    url: str = field(repr=False)
    detail: Detail = "high"


@dataclass(frozen=True, slots=True)
class Video:
    """An encoded video file (MP4, WebM, ...), not frames. Raises InvalidVideo on construction for one too large."""

    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.data) > MAX_VIDEO_MIB << 20:
            raise InvalidVideo(f"the video is {len(self.data) >> 20} MiB; the limit is {MAX_VIDEO_MIB} MiB: cut it")


@dataclass(frozen=True, slots=True)
class VideoUrl:
    """A video that the engine fetches first. No message quotes the URL's query."""

    url: str = field(repr=False)


Part = Text | Image | ImageUrl | Video | VideoUrl


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON text of its arguments' schema, an object.

    Raises InvalidParameter on construction.
    """

    name: str
    description: str = ""
    parameters: str = '{"type": "object", "properties": {}}'

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not isinstance(self.description, str):
            raise InvalidParameter(f"a tool needs a name, and its description must be a text: {self.name!r}")
        _require_object(f"the parameters of tool {self.name!r}", self.parameters)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is the JSON text of an object. Raises InvalidParameter on construction if it is not."""

    name: str
    arguments: str
    id: str = ""

    def __post_init__(self) -> None:
        _require_object(f"the arguments of a call of tool {self.name!r}", self.arguments)


def _require_object(name: str, text: object) -> None:
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidParameter(f"{name} must be the text of a JSON object, not {str(text)[:200]!r}")


@dataclass(frozen=True, slots=True)
class Message:
    """An assistant's message may hold the calls that it made; a tool's is the result of the call `tool_call_id`."""

    role: Role
    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


def _require_number(name: str, value: object, low: float, high: float, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidParameter(f"{name} must be a number, not {value!r}")
    if not low <= value <= high:
        raise InvalidParameter(f"{name} is {value}; it must be {hint}")


def _require_integer(name: str, value: object, low: int, high: int, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameter(f"{name} must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise InvalidParameter(f"{name} is {value}; it must be {hint}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when a sequence ends. Raises InvalidParameter on construction.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch the filter off. The penalties follow the
    common definitions: repetition (Keskar et al. 2019) divides or multiplies the logits of every token seen in prompt
    or output; presence and frequency (OpenAI) subtract from the logits of tokens in the output.

    With `json_object` the output is a JSON object, with `json_schema` (a schema's JSON text) one that fits the schema:
    tokens that would lead elsewhere are never chosen. Stop words and max_tokens still end it wherever it is.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    json_object: bool = False
    json_schema: str | None = None

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature, 0.0, 100.0, "between 0 and 100")
        _require_number("top_p", self.top_p, 0.0, 1.0, "above 0 and at most 1")
        if self.top_p == 0.0:
            raise InvalidParameter("top_p is 0; it must be above 0 and at most 1 (use top_k 1 or temperature 0)")
        _require_integer("top_k", self.top_k, 0, 2**31 - 1, "0 (off) or more")
        _require_number("min_p", self.min_p, 0.0, 1.0, "between 0 and 1")
        _require_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "between 0.01 and 100 (1 is off)")
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0, "between -2 and 2")
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "between -2 and 2")
        if self.seed is not None:
            _require_integer("seed", self.seed, 0, MAX_SEED, f"between 0 and {MAX_SEED}")
        _require_integer("max_tokens", self.max_tokens, 1, 2**31 - 1, "1 or more")
        if len(self.stop) > MAX_STOP_WORDS:
            raise InvalidParameter(f"{len(self.stop)} stop words; at most {MAX_STOP_WORDS} are allowed")
        if any(not isinstance(word, str) or not word for word in self.stop):
            raise InvalidParameter("every stop word must be a text of at least one character")
        if not isinstance(self.ignore_eos, bool):
            raise InvalidParameter(f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        self._check_grammar()

    def _check_grammar(self) -> None:
        if not isinstance(self.json_object, bool):
            raise InvalidParameter(f"json_object must be true or false, not {self.json_object!r}")
        if self.json_schema is not None and not isinstance(self.json_schema, str):
            raise InvalidParameter(f"json_schema must be a text that holds a JSON schema, not {self.json_schema!r}")
        if self.schema is not None and self.ignore_eos:
            raise InvalidParameter("ignore_eos cannot go on after the end of a JSON answer; switch one of them off")

    @property
    def schema(self) -> str | None:
        """JSON text of the schema that the output must fit; None for free text."""
        return self.json_schema or ('{"type":"object"}' if self.json_object else None)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def is_deterministic(self) -> bool:
        """The same request gives the same answer, so the answer may be cached."""
        return self.is_greedy or self.seed is not None

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Request:
    """One completion. `timeout_s` None means the engine's own limit.

    `enable_thinking` switches the reasoning of models that can do without; None leaves it to the model's chat template.
    A constrained answer comes without reasoning.
    """

    model: str
    messages: tuple[Message, ...]
    sampling: SamplingParams = SamplingParams()
    timeout_s: float | None = None
    tools: tuple[Tool, ...] = ()
    enable_thinking: bool | None = None

    def __post_init__(self) -> None:
        if self.enable_thinking is not None and not isinstance(self.enable_thinking, bool):
            raise InvalidParameter(f"enable_thinking must be true or false, not {self.enable_thinking!r}")
        if len(self.tools) > MAX_TOOLS:
            raise InvalidParameter(f"{len(self.tools)} tools; at most {MAX_TOOLS} are allowed")
        if self.tools and self.sampling.schema is not None:
            raise InvalidParameter(
                "an answer in JSON cannot call tools; remove the tools, or set response_format to text"
            )
        if not self.messages:
            raise InvalidRequest("the prompt is empty; send at least one message")
        for message in self.messages:
            if message.role not in ROLES:
                raise InvalidRequest(f"unknown message role {message.role!r}; use one of {', '.join(ROLES)}")
        if not any(_has_content(part) for message in self.messages for part in message.parts):
            raise InvalidRequest("the prompt is empty; write a question or add an image")

    @property
    def thinking(self) -> bool | None:
        return self.enable_thinking if self.sampling.schema is None else False

    @property
    def shown(self) -> tuple[Image | Video, ...]:
        """All images and videos in reading order."""
        return shown(self.messages)

    @property
    def has_videos(self) -> bool:
        return any(isinstance(part, Video | VideoUrl) for message in self.messages for part in message.parts)

    @property
    def urls(self) -> tuple[ImageUrl | VideoUrl, ...]:
        """The images and videos that are still to be fetched, in reading order."""
        parts = (part for message in self.messages for part in message.parts)
        return tuple(part for part in parts if isinstance(part, ImageUrl | VideoUrl))


def shown(messages: Iterable[Message]) -> tuple[Image | Video, ...]:
    """All images and videos in reading order."""
    return tuple(part for message in messages for part in message.parts if isinstance(part, Image | Video))


def _has_content(part: Part) -> bool:
    return bool(part.text.strip()) if isinstance(part, Text) else True


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `prompt_tokens` includes `image_tokens`; `reused_tokens` of them came from the prefix index."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the moment the engine accepted the request to three moments, and two times in between.

    `queued_s` is from prepared to the first place in a step, `prefill_s` from there to the first token, images
    included; an answer from the cache has neither.
    """

    prepared_s: float
    first_token_s: float
    total_s: float
    queued_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text of one or more new tokens; `text` may be empty while a character, stop word or tool call is incomplete.

    `tool_calls` became complete with these tokens; their text is not in `text`.
    """

    text: str
    tokens: int
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a stream that did not fail."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    from_cache: bool = False


Event = Chunk | Finished
