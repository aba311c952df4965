"""Dify's prompt messages as an engine request."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dify_plugin.entities.model.message import (
    AssistantPromptMessage,
    ImagePromptMessageContent,
    MultiModalPromptMessageContent,
    PromptMessage,
    PromptMessageContent,
    PromptMessageRole,
    PromptMessageTool,
    TextPromptMessageContent,
    ToolPromptMessage,
    VideoPromptMessageContent,
)

from engine.errors import EngineError, InvalidImage, InvalidRequest, InvalidVideo
from engine.request import Detail, Image, ImageUrl, Message, Part, Request, Role, Text, Video, VideoUrl
from models.llm.parameters import enable_thinking, sampling_params
from models.llm.tools import engine_calls, engine_tools

ROLES: dict[PromptMessageRole, Role] = {
    PromptMessageRole.SYSTEM: "system",
    PromptMessageRole.DEVELOPER: "system",
    PromptMessageRole.USER: "user",
    PromptMessageRole.TOOL: "tool",
    PromptMessageRole.ASSISTANT: "assistant",
}


def engine_request(
    model: str,
    prompt_messages: Sequence[PromptMessage],
    parameters: Mapping[str, Any],
    stop: Sequence[str] | None = None,
    tools: Sequence[PromptMessageTool] | None = None,
) -> Request:
    """Raises InvalidRequest or one of its children with a sentence for the user."""
    return Request(
        model,
        engine_messages(prompt_messages),
        sampling_params(parameters, stop),
        tools=engine_tools(tools),
        enable_thinking=enable_thinking(parameters),
    )


def engine_messages(prompt_messages: Sequence[PromptMessage]) -> tuple[Message, ...]:
    """Messages without content (Dify sends an empty system prompt where none was written) are left out."""
    return tuple(filter(_says_something, map(_message, prompt_messages)))


def _says_something(message: Message) -> bool:
    return bool(message.parts or message.tool_calls or message.role == "tool")


def _message(message: PromptMessage) -> Message:
    calls = engine_calls(message) if isinstance(message, AssistantPromptMessage) else ()
    call_id = message.tool_call_id if isinstance(message, ToolPromptMessage) else ""
    return Message(ROLES[message.role], _parts(message), calls, call_id)


def _parts(message: PromptMessage) -> tuple[Part, ...]:
    if message.content is None or isinstance(message.content, str):
        return (Text(message.content),) if message.content else ()
    return tuple(_content_parts(message.content))


def _content_parts(contents: Iterable[PromptMessageContent]) -> Iterable[Part]:
    for content in contents:
        match content:
            case TextPromptMessageContent(data=text):
                if text:
                    yield Text(text)
            case ImagePromptMessageContent():
                yield _image(content)
            case VideoPromptMessageContent():
                yield _video(content)
            case _:
                kind = str(getattr(content, "type", type(content).__name__))
                raise InvalidRequest(f"text, images and videos can be read; {kind} files cannot: remove them")


def _image(content: ImagePromptMessageContent) -> Image | ImageUrl:
    source = _source(content, "image", InvalidImage)
    return Image(source, _detail(content)) if isinstance(source, bytes) else ImageUrl(source, _detail(content))


def _video(content: VideoPromptMessageContent) -> Video | VideoUrl:
    source = _source(content, "video", InvalidVideo)
    return Video(source) if isinstance(source, bytes) else VideoUrl(source)


def _source(content: MultiModalPromptMessageContent, kind: str, invalid: type[EngineError]) -> bytes | str:
    """A file or its URL: what Dify sends (base64 beside a MIME type, or a URL), and data URIs in either field."""
    source = content.base64_data or content.url
    if source.startswith("data:"):
        source = source.partition(",")[2]
    elif not content.base64_data and source:
        return source
    if not source:
        raise invalid(f"the {kind} {content.filename!r} is empty" if content.filename else f"the {kind} is empty")
    try:
        return _decode_base64(source)
    except ValueError as problem:
        raise invalid(f"the {kind} is not valid base64 ({problem}); send the file's bytes as base64") from None


def _detail(content: ImagePromptMessageContent) -> Detail:
    """Low only where Dify says so: the SDK's default is low, and to ask for nothing is not to ask for less."""
    is_low = content.detail == ImagePromptMessageContent.DETAIL.LOW and "detail" in content.model_fields_set
    return "low" if is_low else "high"


def _decode_base64(text: str) -> bytes:
    """Raises ValueError."""
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # some senders break lines or leave out the padding
        compact = "".join(text.split()).rstrip("=")
    return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
