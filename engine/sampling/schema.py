"""A JSON schema as it is given to the grammar: read, and narrowed to what a model should be able to write.

A schema without `additionalProperties` lets a model add members for ever. Where an object names its properties it gets
those alone (as xgrammar's strict mode does), which every validator of the wider schema accepts too.
"""

from __future__ import annotations

import json
from typing import Any

from engine.errors import InvalidParameter

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 100  # the grammar library gives up at 128
_ONE = ("items", "additionalItems")
_LISTS = ("anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
# With one of these beside `properties` an object's members may be named elsewhere, or are counted.
_OPEN = {
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "minProperties",
    "propertyNames",
    "$ref",
    "anyOf",
    "oneOf",
    "allOf",
}


def read_schema(text: str) -> str:
    """The narrowed schema as JSON text, its order kept. Raises InvalidParameter."""
    if len(text) > MAX_CHARACTERS:
        raise InvalidParameter(f"the JSON schema has {len(text)} characters; at most {MAX_CHARACTERS} are allowed")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise InvalidParameter(f"json_schema is not JSON: {problem}") from None
    if not isinstance(schema, dict):
        raise InvalidParameter(f"json_schema holds {_kind(schema)}; it must hold a JSON object, the schema")
    if _depth(schema) > MAX_DEPTH:
        raise InvalidParameter(f"the JSON schema is nested more than {MAX_DEPTH} levels deep; use $ref")
    if '"allOf"' not in text:  # what is closed in one branch could be named in another
        schema = _narrowed(schema)
    return json.dumps(schema, ensure_ascii=False)


def _narrowed(schema: Any) -> Any:
    """Of a schema and, inside it, of every other; what is no schema stays as it is."""
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    for name in _ONE:
        if name in result:
            result[name] = _narrowed(result[name])
    if isinstance(result.get("additionalProperties"), dict):
        result["additionalProperties"] = _narrowed(result["additionalProperties"])
    for name in _LISTS:
        if isinstance(result.get(name), list):
            result[name] = [_narrowed(one) for one in result[name]]
    for name in _MAPS:
        if isinstance(result.get(name), dict):
            result[name] = {key: _narrowed(one) for key, one in result[name].items()}
    properties, required = result.get("properties"), result.get("required", [])
    if isinstance(properties, dict) and properties and not _OPEN & result.keys():
        named = isinstance(required, list) and all(name in properties for name in required if isinstance(name, str))
        if named:
            result["additionalProperties"] = False
    return result


def _depth(value: Any) -> int:
    deepest, open_values = 0, [(value, 1)]
    while open_values:
        one, depth = open_values.pop()
        if isinstance(one, dict | list):
            deepest = max(deepest, depth)
            open_values += [(inner, depth + 1) for inner in (one.values() if isinstance(one, dict) else one)]
    return deepest


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
