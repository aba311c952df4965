"""Dify's model parameters as the engine's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from engine.errors import InvalidParameter
from engine.request import SamplingParams

RESPONSE_FORMATS = ("text", "json_object", "json_schema")
_OWN = ("response_format", "json_schema", "enable_thinking")
SAMPLING = {field.name for field in fields(SamplingParams)} - {"stop", "json_object"}
KNOWN = SAMPLING | set(_OWN)


def sampling_params(parameters: Mapping[str, Any], stop: Sequence[str] | None = None) -> SamplingParams:
    """Dify's names are the engine's. Raises InvalidParameter for an unknown name, a wrong type or range."""
    if unknown := sorted(parameters.keys() - KNOWN):
        raise InvalidParameter(f"unknown parameter {unknown[0]!r}; known: {', '.join(sorted(KNOWN))}")
    given = {name: value for name, value in parameters.items() if value is not None and name not in _OWN}
    return SamplingParams(**given, **_grammar(parameters), stop=tuple(stop or ()))


def enable_thinking(parameters: Mapping[str, Any]) -> bool | None:
    value = parameters.get("enable_thinking")
    return value if value is None or isinstance(value, bool) else _boolean(value)


def _boolean(value: Any) -> bool:
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise InvalidParameter(f"enable_thinking must be true or false, not {value!r}")


def _grammar(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What of the output's form is asked for. Dify sets `response_format` where the model's rules offer it."""
    form, given = parameters.get("response_format") or None, parameters.get("json_schema") or None
    if form is not None and form not in RESPONSE_FORMATS:
        raise InvalidParameter(f"response_format is {form!r}; choose one of {', '.join(RESPONSE_FORMATS)}")
    if form == "json_schema" and given is None:
        raise InvalidParameter("response_format is json_schema, but there is no schema; write it into json_schema")
    if form == "text" or (form is None and given is None):
        return {}
    return {"json_object": True} if given is None else {"json_schema": _bare_schema(given)}


def _bare_schema(given: Any) -> str:
    """The schema alone: Dify sends `{"name": ..., "schema": {...}}` as a text, people the schema itself."""
    try:
        schema = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as problem:
        raise InvalidParameter(f"json_schema is not JSON: {problem}") from None
    for wrapper in ("json_schema", "schema"):
        if isinstance(schema, dict) and isinstance(schema.get(wrapper), dict) and not schema.keys() & _OF_A_SCHEMA:
            schema = schema[wrapper]
    return json.dumps(schema, ensure_ascii=False)


_OF_A_SCHEMA = {"properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "items"}
