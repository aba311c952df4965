"""The checkpoint's chat template.

Rendered as transformers 5.17 does (utils/chat_template_utils.py), in Jinja's sandbox: a template comes with the weights
from wherever they come.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, InvalidParameter, InvalidRequest
from engine.prompts.reasoning import CLOSING, OPENING, closed, without_earlier
from engine.prompts.tokenizer import read_json, special_tokens
from engine.prompts.tool_calls import END, START, ToolFormat
from engine.request import Message, Part, Role, Text, Tool, ToolCall, Video

_PROBE = "tessera"
# What templates raise: their own errors, and Python's from expressions on values they did not expect.
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatTemplate:
    """Messages to the text that the model was trained on. Thread-safe.

    `has_images` tells how the template expects a message: as a list of parts, or as one string. `tool_format` is how
    the model calls tools; None if its template knows none, or teaches a form that is not read.
    """

    def __init__(self, folder: Path, *, has_images: bool) -> None:
        source, file = _find_template(folder)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{file} is not a valid chat template: {error}") from error
        self._names = special_tokens(folder)
        self._knows_reasoning = CLOSING in source
        self.may_think = OPENING in source or "enable_thinking" in source
        self._has_images = has_images
        self._takes_system = True
        try:
            self._render([_message("user", _PROBE)])
        except _RENDER_ERRORS as error:
            raise CheckpointError(f"{file} fails on a plain question: {error}") from error
        self._takes_system = self._probe_system()
        self.tool_format = self._probe_tools()

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None) -> str:
        """The prompt's text, each image as the template's placeholder. Raises InvalidRequest when the template refuses.

        Where the template knows no system role, system messages go before the text of the first user message; where it
        knows no tools, their results are the user's. `thinking` False gives a prompt that the answer follows at once.
        """
        if thinking and not self.may_think:
            raise InvalidParameter("this model does not think before it answers; switch enable_thinking off")
        if self.tool_format is None:
            messages = _without_tools(messages, tools)
        if not self._takes_system:
            messages = _fold_system(messages)
        messages = without_earlier(messages, keep_current=self._knows_reasoning)
        try:
            prompt = self._render(messages, tools, thinking)
        except _RENDER_ERRORS as error:
            raise InvalidRequest(f"this model's chat template refuses these messages: {error}") from error
        return closed(prompt) if thinking is False else prompt

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), thinking: bool | None = None) -> str:
        names = {call.id: call.name for message in messages for call in message.tool_calls}
        return self._template.render(
            messages=[self._plain(message, names) for message in messages],
            tools=[_plain_tool(tool) for tool in tools] or None,
            documents=None,
            add_generation_prompt=True,
            **({} if thinking is None else {"enable_thinking": thinking}),
            **self._names,
        )

    def _plain(self, message: Message, names: Mapping[str, str]) -> dict[str, Any]:
        """As transformers documents it: a call's arguments as a mapping, its result by name and id."""
        plain: dict[str, Any] = {"role": message.role, "content": self._content(message)}
        if message.tool_calls:
            plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
        if message.role == "tool":
            plain |= {"tool_call_id": message.tool_call_id, "name": names.get(message.tool_call_id, "")}
        return plain

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        if not self._has_images or (message.tool_calls and not message.parts):
            return "".join(part.text for part in message.parts if isinstance(part, Text))
        parts = message.parts or (Text(""),)  # templates look at the first part
        return [_plain_part(part) for part in parts]

    @property
    def shows_videos(self) -> bool:
        question = Text(_PROBE)
        try:
            return self._render([Message("user", (Video(b""), question))]) != self._render(
                [Message("user", (question,))]
            )
        except _RENDER_ERRORS:
            return False

    def _probe_system(self) -> bool:
        """Some templates raise for a system message, some leave it out."""
        try:
            return _PROBE in self._render([_message("system", _PROBE), _message("user", "?")])
        except _RENDER_ERRORS:
            return False

    def _probe_tools(self) -> ToolFormat | None:
        """How the template writes a call shows how the model does."""
        name = f"{_PROBE}_tool"
        question, answer = _message("user", "?"), Message("tool", (Text("!"),), tool_call_id="1")
        call = Message("assistant", (), (ToolCall(name, '{"key": "value"}', "1"),))
        try:
            offered = self._render([question], [Tool(name, "?")])
            called = self._render([question, call, answer])
        except _RENDER_ERRORS:
            return None
        if name not in offered or START not in called or END not in called:
            return None
        if f"<function={name}>" in called:
            return "xml"
        return "json" if f'"{name}"' in called else None


def _plain_part(part: Part) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "video" if isinstance(part, Video) else "image"}


def _plain_tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)}
    return {"type": "function", "function": function}


def _plain_call(call: ToolCall) -> dict[str, Any]:
    return {
        "type": "function",
        "id": call.id,
        "function": {"name": call.name, "arguments": json.loads(call.arguments)},
    }


def _without_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    if tools:
        raise InvalidRequest("this model calls no tools; choose an agent strategy that works without tool calls")
    if any(message.tool_calls for message in messages):
        raise InvalidRequest(
            "the conversation contains tool calls; this model calls no tools: remove them from its agent"
        )
    return [replace(message, role="user") if message.role == "tool" else message for message in messages]


def _message(role: Role, text: str) -> Message:
    return Message(role, (Text(text),))


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    system = [part for message in messages if message.role == "system" for part in message.parts]
    others = [message for message in messages if message.role != "system"]
    if not system:
        return others
    first = next((index for index, message in enumerate(others) if message.role == "user"), None)
    if first is None:
        return [Message("user", tuple(system)), *others]
    others[first] = replace(others[first], parts=(*system, Text("\n\n"), *others[first].parts))
    return others


def _find_template(folder: Path) -> tuple[str, Path]:
    """The template and the file it is in. Raises CheckpointError."""
    path = folder / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8"), path
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template, folder / name
    raise CheckpointError(
        f"{folder} has no chat template: neither chat_template.jinja nor a chat_template in tokenizer_config.json;"
        " use an instruction-tuned checkpoint, or add the file"
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks what training learns from; here its body is plain text."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's spelling

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
