"""Random JSON schemas whose values are bounded: strings and arrays have a greatest length."""

from __future__ import annotations

import random
from typing import Any

KEYS = ["name", "größe", "id", "名前", "a b", 'quo"te', "back\\slash", "list", "né\nw", "x", "properties", "type", "🙂"]
TEXTS = ["red", "grün", "蓝色", "", 'a "quoted" one', "tab\there", "emoji 👩‍👩‍👧", "null", "line\nbreak"]
PATTERNS = [r"^[a-z]{2,5}$", r"^\d{3}-\d{4}$", r"^(yes|no|größer)$"]
FORMATS = ["date", "time", "date-time", "ipv4", "uuid"]
Schema = dict[str, Any]


def random_schema(seed: int) -> Schema:
    """An object at the top, as Dify's schemas are; some recursive by reference."""
    chance = random.Random(seed)
    schema = _object(chance, 3)
    if chance.random() < 0.15:
        node = {
            "type": "object",
            "properties": {"value": {"type": "boolean"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}},
            "required": ["value", "next"],
        }
        schema["properties"]["chain"] = {"$ref": "#/$defs/n"}
        schema["required"] = [*schema.get("required", []), "chain"]
        schema["$defs"] = {"n": node}
    return schema


def _value(chance: random.Random, depth: int) -> Schema:
    plain = [_string, _number, _integer, _enum, _constant, _boolean]
    nested = [_object, _array, _union] if depth else []
    number = chance.randrange(len(plain) + 2 * len(nested))
    return plain[number](chance) if number < len(plain) else nested[number % len(nested)](chance, depth - 1)


def _object(chance: random.Random, depth: int) -> Schema:
    keys = chance.sample(KEYS, chance.randint(1, 4))
    schema: Schema = {"type": "object", "properties": {key: _value(chance, depth) for key in keys}}
    if chance.random() < 0.8:
        schema["required"] = chance.sample(keys, chance.randint(0, len(keys)))
    if chance.random() < 0.5:
        schema["additionalProperties"] = False
    if chance.random() < 0.3:
        schema["description"] = chance.choice(TEXTS)
    return schema


def _array(chance: random.Random, depth: int) -> Schema:
    if chance.random() < 0.2:
        items = [_value(chance, depth) for _ in range(chance.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    least = chance.randint(0, 2)
    bounds = {"minItems": least, "maxItems": least + chance.randint(0, 2)}
    return {"type": "array", "items": _value(chance, depth), **bounds}


def _union(chance: random.Random, depth: int) -> Schema:
    if chance.random() < 0.3:
        return {"oneOf": [{"type": "string", "maxLength": 5}, _integer(chance), {"type": "null"}]}  # do not overlap
    return {"anyOf": [_value(chance, depth) for _ in range(chance.randint(2, 3))]}


def _string(chance: random.Random) -> Schema:
    kind = chance.random()
    if kind < 0.2:
        return {"type": "string", "pattern": chance.choice(PATTERNS)}
    if kind < 0.35:
        return {"type": "string", "format": chance.choice(FORMATS)}
    least = chance.randint(0, 3)
    return {"type": ["string", "null"] if kind > 0.85 else "string", "minLength": least, "maxLength": least + 8}


def _number(chance: random.Random) -> Schema:
    if chance.random() < 0.5:
        return {"type": "number"}
    low = chance.choice([-1000.5, -1, 0, 0.25])
    return {"type": "number", "minimum": low, "maximum": low + chance.choice([0.5, 1, 2000])}


def _integer(chance: random.Random) -> Schema:
    if chance.random() < 0.4:
        return {"type": "integer"}
    low = chance.randint(-(10**6), 10**6)
    return {"type": "integer", "minimum": low, "exclusiveMaximum": low + chance.choice([1, 10, 12345])}


def _enum(chance: random.Random) -> Schema:
    return {"enum": chance.sample([*TEXTS, 1, 2.5, None, True, {"größe": [1]}], chance.randint(1, 4))}


def _constant(chance: random.Random) -> Schema:
    return {"const": chance.choice([*TEXTS, -7, False])}


def _boolean(chance: random.Random) -> Schema:
    return {"type": chance.choice(["boolean", "null"])}
