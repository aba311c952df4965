"""The form of the answer and the thinking switch, as Dify sends them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dify_plugin.entities.model.message import ensure_prompt_message

from engine.errors import InvalidParameter
from models.llm.parameters import sampling_params
from models.llm.prompt import engine_request

SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "ä": {"type": "integer"}}, "required": ["z"]}


@pytest.mark.parametrize(
    "given",
    [
        json.dumps(SCHEMA),
        json.dumps({"schema": SCHEMA, "name": "llm_response"}),
        json.dumps({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}),
        SCHEMA,
    ],
)
@pytest.mark.parametrize("form", ["json_schema", None, "json_object"])
def test_a_schema_is_found_in_what_dify_and_people_send(given: Any, form: str | None) -> None:
    params = sampling_params({"json_schema": given, "response_format": form})
    assert params.json_schema is not None
    assert json.loads(params.json_schema) == SCHEMA
    assert params.json_schema.index('"z"') < params.json_schema.index('"ä"')


def test_a_schema_with_a_member_called_schema_is_left_alone() -> None:
    schema = {"type": "object", "properties": {"schema": {"type": "string"}}, "schema": {"type": "string"}}
    assert json.loads(sampling_params({"json_schema": json.dumps(schema)}).json_schema or "") == schema


def test_the_form_alone() -> None:
    assert sampling_params({"response_format": "json_object"}).json_object
    assert sampling_params({"response_format": "text", "json_schema": json.dumps(SCHEMA)}).schema is None
    assert sampling_params({"response_format": "", "json_schema": ""}).schema is None


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"response_format": "json_schema"}, "no schema"),
        ({"response_format": "yaml"}, "response_format"),
        ({"json_schema": "{"}, "not JSON"),
        ({"response_format": "json_object", "ignore_eos": True}, "ignore_eos"),
        ({"json_object": True}, "json_object"),
    ],
)
def test_a_form_that_cannot_be_is_refused(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidParameter, match=said):
        sampling_params(parameters)


@pytest.mark.parametrize(("value", "thinking"), [(True, True), (False, False), (None, None), ("false", False)])
def test_the_thinking_switch(value: Any, thinking: bool | None) -> None:
    question = ensure_prompt_message({"role": "user", "content": "hi"})
    assert engine_request("demo", [question], {"enable_thinking": value}).enable_thinking is thinking
    with pytest.raises(InvalidParameter, match="enable_thinking"):
        engine_request("demo", [question], {"enable_thinking": "perhaps"})
