"""Calls of tools in a model's output, in the form that its chat template teaches.

`json` (Hermes, Qwen2.5, Qwen3, Qwen3-VL)
    <tool_call>{"name": "clock", "arguments": {"zone": "UTC"}}</tool_call>
`xml` (Qwen3-Coder, Qwen3.5)
    <tool_call><function=clock><parameter=zone>UTC</parameter></function></tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from engine.errors import InvalidParameter
from engine.prompts.reasoning import CLOSING, OPENING
from engine.request import Tool, ToolCall

ToolFormat = Literal["json", "xml"]
START, END = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)(?:</parameter>\s*(?=<parameter=|\Z)|\Z)", re.DOTALL)
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}


class ToolCallReader:
    """Text passes until a call begins; a call is handed out when it is complete.

    What looks like a call and is none is text. Inside reasoning nothing is a call.
    """

    def __init__(self, form: ToolFormat, tools: Sequence[Tool], *, thinking: bool) -> None:
        self._form = form
        self._types = {tool.name: _types(tool) for tool in tools}
        self._held = ""  # what is not decided yet
        self._awaits = CLOSING if thinking else ""
        self._is_first = not thinking
        self._has_called = False

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """(text that may go out, calls that are complete)."""
        self._held += text
        return self._read(last=False)

    def flush(self) -> tuple[str, tuple[ToolCall, ...]]:
        """What is left at the end of the output; a call may lack its closing tag there."""
        if self._has_called and self._held.isspace():
            self._held = ""
        return self._read(last=True)

    def _read(self, *, last: bool) -> tuple[str, tuple[ToolCall, ...]]:
        out, calls = "", []
        while self._held:
            if self._is_first and not self._decide_first(last):
                break
            if self._awaits:
                text, ended = self._reasoning(last)
                out += text
                if not ended:
                    break
                continue
            start = self._held.find(START)
            if start < 0:
                keep = 0 if last else _undecided(self._held)
                out, self._held = out + self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                break
            before, self._held = self._held[:start].rstrip(), self._held[start:]
            out += before
            call, length = self._call(last)
            if call is not None:
                calls.append(call)
                self._has_called = True
            elif length:
                out += self._held[:length]
            else:
                break
            self._held = self._held[length:]
        return out, tuple(calls)

    def _decide_first(self, last: bool) -> bool:
        """Whether the output begins with reasoning of the model's own; False while that is open."""
        start = self._held.lstrip()
        if not last and len(start) < len(OPENING) and OPENING.startswith(start):
            return False
        self._is_first = False
        if start.startswith(OPENING):
            self._awaits = CLOSING
        return True

    def _reasoning(self, last: bool) -> tuple[str, bool]:
        end = self._held.find(self._awaits)
        if end < 0:
            keep = 0 if last else _overlap(self._held, self._awaits)
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            return text, False
        end += len(self._awaits)
        text, self._held, self._awaits = self._held[:end], self._held[end:], ""
        return text, True

    def _call(self, last: bool) -> tuple[ToolCall | None, int]:
        """The call that the held text begins with and its length; (None, n) for n characters that are no call.

        (None, 0) while it is incomplete. An end tag inside a string of the arguments is not the end.
        """
        ends = [found.start() for found in re.finditer(END, self._held)]
        for end in ends:
            call = self._parse(self._held[len(START) : end])
            if call is not None:
                return call, end + len(END)
        if ends and (last or any(self._held[end + len(END) :].lstrip().startswith(START) for end in ends)):
            return None, ends[0] + len(END)
        if not last:
            return None, 0
        return self._parse(self._held[len(START) :]), len(self._held)

    def _parse(self, body: str) -> ToolCall | None:
        try:
            return _from_json(body) if self._form == "json" else self._from_xml(body)
        except (ValueError, RecursionError, InvalidParameter):
            return None

    def _from_xml(self, body: str) -> ToolCall | None:
        function = _FUNCTION.fullmatch(body.strip())
        if function is None:
            return None
        name, inside = function[1].strip(), function[2]
        types = self._types.get(name, {})
        arguments = {key.strip(): _value(value, types.get(key.strip())) for key, value in _PARAMETER.findall(inside)}
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _from_json(body: str) -> ToolCall | None:
    value = json.loads(body)
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return ToolCall(name, json.dumps({} if arguments is None else arguments, ensure_ascii=False))


def _value(text: str, declared: frozenset[str] | None) -> Any:
    """A parameter's text as a value of the type that the tool declares; as it is if it is of none."""
    text = text.removeprefix("\n").removesuffix("\n")
    if declared is None or "string" in declared:
        return None if declared and "null" in declared and text == "null" else text
    plain = text.strip()
    if plain.lower() in _CONSTANTS:
        return _CONSTANTS[plain.lower()]
    try:
        return json.loads(plain)
    except (ValueError, RecursionError):
        return text


def _types(tool: Tool) -> dict[str, frozenset[str]]:
    """Of each parameter the types that its schema declares, where it does."""
    properties = json.loads(tool.parameters).get("properties")
    found = {}
    for name, schema in properties.items() if isinstance(properties, dict) else ():
        if types := _declared(schema):
            found[name] = types
    return found


def _declared(schema: Any) -> frozenset[str]:
    if not isinstance(schema, dict):
        return frozenset()
    types = schema.get("type", [])
    found = {one for one in ([types] if isinstance(types, str) else types) if isinstance(one, str)}
    for name in ("anyOf", "oneOf"):
        branches = schema.get(name)
        for branch in branches if isinstance(branches, list) else ():
            found |= _declared(branch)
    return frozenset(found)


def _undecided(text: str) -> int:
    """Characters at the end that may belong to a call: blanks before it, and the beginning of its tag."""
    tag = _overlap(text, START)
    rest = text[: len(text) - tag]
    return tag + len(rest) - len(rest.rstrip())


def _overlap(text: str, tag: str) -> int:
    """The length of the longest beginning of the tag that the text ends with."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
