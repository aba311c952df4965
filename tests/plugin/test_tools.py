"""Dify's tools, calls and results become the engine's, however odd their schemas are, and calls become Dify's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dify_plugin.entities.model.message import PromptMessage, PromptMessageTool, ensure_prompt_message

from engine.errors import InvalidParameter
from engine.request import Message, Text, ToolCall
from models.llm.prompt import engine_messages, engine_request
from models.llm.tools import dify_calls, engine_tools

CITY = {"type": "string", "description": "where"}


def said(role: str, content: Any, **more: Any) -> PromptMessage:
    return ensure_prompt_message({"role": role, "content": content, **more})


def call(arguments: str) -> PromptMessage:
    function = {"name": "weather", "arguments": arguments}
    return said("assistant", "", tool_calls=[{"id": "1", "type": "function", "function": function}])


def test_a_call_and_its_result_keep_their_roles_and_ids() -> None:
    messages = engine_messages([call('{"city": "Rome"}'), said("tool", "sunny", tool_call_id="1")])
    assert messages == (
        Message("assistant", (), (ToolCall("weather", '{"city": "Rome"}', "1"),)),
        Message("tool", (Text("sunny"),), tool_call_id="1"),
    )


def test_an_empty_result_stays_a_result() -> None:
    assert engine_messages([said("tool", "", tool_call_id="1")]) == (Message("tool", (), tool_call_id="1"),)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [("", {}), ("{}", {}), ('{"a": 1}', {"a": 1}), ("null", {"input": None}), ("Rome", {"input": "Rome"})],
)
def test_arguments_become_an_object(arguments: str, kept: Any) -> None:
    (message,) = engine_messages([call(arguments)])
    assert json.loads(message.tool_calls[0].arguments) == kept


@pytest.mark.parametrize(
    ("parameters", "properties", "required"),
    [
        ({"type": "object", "properties": {"city": CITY}, "required": ["city"]}, {"city": CITY}, ["city"]),
        ({"properties": {"city": CITY}}, {"city": CITY}, None),
        ({"city": CITY}, {"city": CITY}, None),
        ({"schema": {"type": "object", "properties": {"city": CITY}}}, {"city": CITY}, None),
        ({"type": "object", "properties": None, "required": None}, {}, None),
        ({"type": "object", "properties": []}, {}, None),
        ({"type": "object"}, {}, None),
        ({}, {}, None),
    ],
)
def test_odd_schemas_of_tools_are_understood(parameters: dict[str, Any], properties: Any, required: Any) -> None:
    (tool,) = engine_tools([PromptMessageTool(name="weather", description="", parameters=parameters)])
    schema = json.loads(tool.parameters)
    assert schema["type"] == "object"
    assert schema["properties"] == properties
    assert schema.get("required") == required


def test_tools_are_part_of_the_request() -> None:
    tool = PromptMessageTool(name="weather", description="tells it", parameters={})
    request = engine_request("demo", [said("user", "hi")], {}, tools=[tool])
    assert [(one.name, one.description) for one in request.tools] == [("weather", "tells it")]


def test_a_tool_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="name"):
        engine_tools([PromptMessageTool(name="", description="", parameters={})])


def test_each_call_gets_an_id_of_its_own() -> None:
    first, second = dify_calls([ToolCall("weather", "{}"), ToolCall("weather", "{}")])
    assert first.function == second.function
    assert first.id != second.id
    assert first.type == "function"
