"""Dify's tools and calls as the engine's, and back. Agents send schemas of every kind: what can be understood is."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from dify_plugin.entities.model.message import AssistantPromptMessage, PromptMessageTool

from engine.request import Tool, ToolCall

_NO_PARAMETERS = {"type": "object", "properties": {}}


def engine_tools(tools: Sequence[PromptMessageTool] | None) -> tuple[Tool, ...]:
    """Raises InvalidParameter for a tool without a name."""
    return tuple(Tool(tool.name, tool.description or "", _parameters(tool.parameters)) for tool in tools or ())


def engine_calls(message: AssistantPromptMessage) -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(call.function.name, _arguments(call.function.arguments), call.id) for call in message.tool_calls
    )


def dify_calls(calls: Sequence[ToolCall]) -> list[AssistantPromptMessage.ToolCall]:
    """Each with an id of its own, by which Dify tells calls apart and the tool's result names its call."""
    return [
        AssistantPromptMessage.ToolCall(
            id=f"call_{uuid.uuid4().hex}",
            type="function",
            function=AssistantPromptMessage.ToolCall.ToolCallFunction(name=call.name, arguments=call.arguments),
        )
        for call in calls
    ]


def _parameters(given: Mapping[str, Any] | None) -> str:
    """A schema of an object, in whatever form it came: bare properties, a wrapped schema, or nothing."""
    schema: Any = given or {}
    for wrapper in ("parameters", "schema"):
        if isinstance(schema.get(wrapper), dict) and "properties" not in schema:
            schema = schema[wrapper]
    if (
        "properties" not in schema
        and "type" not in schema
        and schema
        and all(isinstance(v, dict) for v in schema.values())
    ):
        schema = {"type": "object", "properties": schema}
    complete = _NO_PARAMETERS | {name: value for name, value in schema.items() if value is not None}
    if not isinstance(complete["properties"], dict):
        complete["properties"] = {}
    return json.dumps(complete, ensure_ascii=False, default=str)


def _arguments(text: str) -> str:
    """The text of a JSON object, whatever an agent kept of a call."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = text
    return (
        text if isinstance(value, dict) and text else json.dumps(value if isinstance(value, dict) else {"input": value})
    )
