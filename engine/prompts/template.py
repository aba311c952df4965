"""The checkpoint's chat template.

Rendered as transformers 5.17 does (utils/chat_template_utils.py), in Jinja's sandbox: a template comes with the weights
from wherever they come.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, InvalidRequest
from engine.prompts.tokenizer import read_json, special_tokens
from engine.request import Image, Message, Role, Text

_PROBE = "tessera"
# What templates raise: their own errors, and Python's from expressions on values they did not expect.
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatTemplate:
    """Messages to the text that the model was trained on. Thread-safe.

    `has_images` tells how the template expects a message: as a list of parts, or as one string.
    """

    def __init__(self, folder: Path, *, has_images: bool) -> None:
        source, file = _find_template(folder)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{file} is not a valid chat template: {error}") from error
        self._names = special_tokens(folder)
        self._has_images = has_images
        self._takes_system = True
        try:
            self._render([_message("user", _PROBE)])
        except _RENDER_ERRORS as error:
            raise CheckpointError(f"{file} fails on a plain question: {error}") from error
        self._takes_system = self._probe_system()

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text, each image as the template's placeholder. Raises InvalidRequest when the template refuses.

        Where the template knows no system role, system messages go before the text of the first user message.
        """
        if not self._takes_system:
            messages = _fold_system(messages)
        try:
            return self._render(messages)
        except _RENDER_ERRORS as error:
            raise InvalidRequest(f"this model's chat template refuses these messages: {error}") from error

    def _render(self, messages: Sequence[Message]) -> str:
        plain = [{"role": message.role, "content": self._content(message)} for message in messages]
        return self._template.render(
            messages=plain, tools=None, documents=None, add_generation_prompt=True, **self._names
        )

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        if not self._has_images:
            return "".join(part.text for part in message.parts if isinstance(part, Text))
        parts = message.parts or (Text(""),)  # templates look at the first part
        return [{"type": "text", "text": p.text} if isinstance(p, Text) else {"type": "image"} for p in parts]

    def _probe_system(self) -> bool:
        """Some templates raise for a system message, some leave it out."""
        try:
            return _PROBE in self._render([_message("system", _PROBE), _message("user", "?")])
        except _RENDER_ERRORS:
            return False


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
    others[first] = Message("user", (*system, Text("\n\n"), *others[first].parts))
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


def count_images(messages: Sequence[Message]) -> int:
    return sum(isinstance(part, Image) for message in messages for part in message.parts)
