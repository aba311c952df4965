"""Calls in a model's output, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.prompts.answer import AnswerReader
from engine.prompts.tool_calls import ToolCallReader, ToolFormat
from engine.request import Chunk, Event, Finished, Timings, Tool, Usage

CLOCK = Tool(
    "clock",
    parameters=json.dumps(
        {
            "type": "object",
            "properties": {
                "zone": {"type": "string"},
                "hours": {"type": "integer"},
                "list": {"type": "array"},
                "flag": {"type": "boolean"},
                "maybe": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            },
        }
    ),
)
FINISHED = Finished("stop", Usage(1, 1), Timings(0, 0, 0))
Read = tuple[str, list[tuple[str, Any]]]


def read(form: ToolFormat, output: str, size: int, *, thinking: bool = False) -> Read:
    """Text and calls of an output in pieces of so many characters."""
    reader = ToolCallReader(form, [CLOCK], thinking=thinking)
    pieces = [output[start : start + size] for start in range(0, len(output), size)]
    parts = [reader.push(piece) for piece in pieces] + [reader.flush()]
    calls = [(call.name, json.loads(call.arguments)) for _, found in parts for call in found]
    return "".join(text for text, _ in parts), calls


JSON_CASES: list[tuple[str, Read]] = [
    ("no call at all", ("no call at all", [])),
    ("a < b, <tool", ("a < b, <tool", [])),
    ('<tool_call>\n{"name": "clock", "arguments": {"zone": "ü"}}\n</tool_call>', ("", [("clock", {"zone": "ü"})])),
    (
        'Let me see.\n\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "b", "parameters": {"x": [1, null]}}</tool_call>\n',
        ("Let me see.", [("clock", {}), ("b", {"x": [1, None]})]),
    ),
    (
        '<tool_call>{"name": "clock", "arguments": "{\\"zone\\": \\"Z\\"}"}</tool_call>',
        ("", [("clock", {"zone": "Z"})]),
    ),
    ('<tool_call>{"name": "clock"}', ("", [("clock", {})])),
    (
        '<tool_call>{"name": "clock", "arguments": {"zone": "</tool_call>"}}</tool_call> done',
        (" done", [("clock", {"zone": "</tool_call>"})]),
    ),
    (
        '<tool_call>{"name": oops}</tool_call>\n<tool_call>{"name": "clock"}</tool_call>',
        ('<tool_call>{"name": oops}</tool_call>', [("clock", {})]),
    ),
    ('<tool_call>{"name": "clock", "argu', ('<tool_call>{"name": "clock", "argu', [])),
    ("<tool_call>[1]</tool_call> and so", ("<tool_call>[1]</tool_call> and so", [])),
    (
        '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>',
        ('<tool_call>{"name": "clock", "arguments": [1]}</tool_call>', []),
    ),
    (
        '<think>a <tool_call>{"name": "clock"}</tool_call></think>\n<tool_call>{"name": "clock"}</tool_call>',
        ('<think>a <tool_call>{"name": "clock"}</tool_call></think>', [("clock", {})]),
    ),
]
XML_CASES: list[tuple[str, Read]] = [
    (
        "Yes.\n\n<tool_call>\n<function=clock>\n<parameter=zone>\nUTC\n+1\n</parameter>\n<parameter=hours>\n12\n</parameter>\n"
        "</function>\n</tool_call>",
        ("Yes.", [("clock", {"zone": "UTC\n+1", "hours": 12})]),
    ),
    ("<tool_call><function=clock></function></tool_call>", ("", [("clock", {})])),
    (
        "<tool_call><function=clock><parameter=zone>12</parameter><parameter=list>[1, {}]</parameter>"
        "<parameter=flag>True</parameter><parameter=maybe>null</parameter><parameter=hours>many</parameter>"
        "<parameter=other>7</parameter></function></tool_call>",
        ("", [("clock", {"zone": "12", "list": [1, {}], "flag": True, "maybe": None, "hours": "many", "other": "7"})]),
    ),
    (
        "<tool_call><function=a></function></tool_call>\n<tool_call><function=b></function></tool_call>",
        ("", [("a", {}), ("b", {})]),
    ),
    (
        "<tool_call>\n<function=clock>\n<parameter=zone>\nUTC\n</parameter>\n</function>\n",
        ("", [("clock", {"zone": "UTC"})]),
    ),
    ("<tool_call>what?</tool_call>", ("<tool_call>what?</tool_call>", [])),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("output", "found"), JSON_CASES)
def test_calls_in_json(output: str, found: Read, size: int) -> None:
    assert read("json", output, size) == found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("output", "found"), XML_CASES)
def test_calls_in_xml(output: str, found: Read, size: int) -> None:
    assert read("xml", output, size) == found


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_nothing_inside_reasoning_that_the_prompt_opened_is_a_call(size: int) -> None:
    call = '<tool_call>{"name": "clock"}</tool_call>'
    assert read("json", f"so {call}</think>\n\n{call}", size, thinking=True) == (f"so {call}</think>", [("clock", {})])


def test_text_goes_out_as_it_comes_and_a_call_when_it_is_complete() -> None:
    reader = ToolCallReader("json", [CLOCK], thinking=False)
    seen = [
        reader.push(piece) for piece in ["Let ", "me", ' <tool_call>{"name"', ': "clock"}', "</tool_", "call>", " x"]
    ]
    assert [text for text, _ in seen] == ["Let", " me", "", "", "", "", " x"]
    assert [len(calls) for _, calls in seen] == [0, 0, 0, 0, 0, 1, 0]


def test_reasoning_gets_the_tag_that_the_prompt_had() -> None:
    reader = AnswerReader(opens_thinking=True, calls=None)
    events: list[Event] = [Chunk("so", 1), Chunk("</think>yes", 2), FINISHED]
    shown = [one for event in events for one in reader.read(event)]
    assert shown == [Chunk("<think>\nso", 1), Chunk("</think>yes", 2), FINISHED]


def test_the_last_call_comes_before_the_end() -> None:
    reader = AnswerReader(opens_thinking=False, calls=ToolCallReader("json", [CLOCK], thinking=False))
    first, second, last = [
        one for event in (Chunk('<tool_call>{"name": "clock"}', 5), FINISHED) for one in reader.read(event)
    ]
    assert first == Chunk("", 5)
    assert isinstance(second, Chunk)
    assert [call.name for call in second.tool_calls] == ["clock"]
    assert last == FINISHED
