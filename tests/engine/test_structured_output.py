"""What a model says under a JSON schema fits the schema, whatever its weights say."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.errors import InvalidParameter
from engine.request import Request
from tests.engine.asking import Answer, ask, picture, request
from tests.engine.conftest import Start
from tests.engine.schemas import random_schema

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def asking_for(schema: Any, *, seed: int = 0, model: str = "tiny-qwen2-vl", **sampling: Any) -> Request:
    """Greedy or drawn, by the seed's parity."""
    drawn = {"temperature": 1.0, "seed": seed} if seed % 2 else {"temperature": 0.0}
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=bool(seed % 3))
    return request(f"fill in form {seed}", model=model, json_schema=text, **{"max_tokens": 900, **drawn, **sampling})


def fits(answer: Answer, schema: Any) -> None:
    assert answer.finished is not None
    assert answer.finished.reason == "stop", answer.text
    value = json.loads(answer.text)
    jsonschema.Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_random_schemas_get_output_that_fits_from_random_weights(start: Start, count: int) -> None:
    engine = start(max_batch_size=16, max_waiting=1000)
    schemas = [random_schema(seed) for seed in range(count)]
    answers = [ask(engine, asking_for(schema, seed=seed)) for seed, schema in enumerate(schemas)]
    for answer, schema in zip(answers, schemas, strict=True):
        fits(answer.wait(300), schema)


def test_constrained_and_free_requests_together_say_what_each_says_alone(start: Start) -> None:
    requests = [
        asking_for(random_schema(seed), seed=seed, model="demo", max_tokens=60)
        if seed % 3
        else request(picture(seed), "what shape?", max_tokens=20, ignore_eos=True)
        for seed in range(24)
    ]
    alone = start(max_batch_size=1)
    expected = [ask(alone, one).wait().result for one in requests]
    together = start()
    assert [answer.wait().result for answer in [ask(together, one) for one in requests]] == expected


def test_penalties_and_truncation_work_within_the_grammar(start: Start) -> None:
    engine = start()
    sampling: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3}
    fits(ask(engine, asking_for(PERSON, seed=5, model="demo", **sampling)).wait(), PERSON)


def test_a_json_object_of_any_form(start: Start) -> None:
    engine = start()
    texts = [
        ask(engine, request("say it", model="tiny-qwen2-vl", json_object=True, temperature=2.0, seed=seed)).wait()
        for seed in range(8)
    ]
    ended = [answer for answer in texts if answer.finished is not None and answer.finished.reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(answer.text), dict) for answer in ended)


def test_a_reply_cut_by_max_tokens_says_so(start: Start) -> None:
    answer = ask(start(), asking_for(PERSON, max_tokens=5)).wait()
    assert answer.finished is not None
    assert answer.finished.reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.text)


def test_a_number_ends_even_if_the_model_would_write_digits_for_ever(start: Start) -> None:
    engine = start()
    schema = {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3}
    model: Any = engine.load("demo").replicas[0][0].runner
    original = model._sample

    def digits_first(logits: list[Any], sequences: list[Any]) -> list[int]:
        loud = [np.array(one) for one in logits]
        for one in loud:
            one[:, ord("0") : ord("9") + 1] += 1000
        tokens: list[int] = original(loud, sequences)
        return tokens

    model._sample = digits_first
    fits(ask(engine, asking_for(schema, model="demo", max_tokens=200)).wait(), schema)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "a list"),
        ('"text"', "a text"),
        ('{"type": "strng"}', "strng"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "greater than"),
        ('{"type": "string", "pattern": "(["}', "regex"),
        ('{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "use anyOf"),
        ('{"$ref": "http://example.com/schema.json"}', "example.com"),
        ('{"a":' * 500 + "{}" + "}" * 500, "levels deep"),
        ('{"a":' * 200_000 + "{}" + "}" * 200_000, "schema"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused_by_name(start: Start, schema: str, said: str) -> None:
    engine = start()
    answer = ask(engine, asking_for(schema, model="demo")).wait()
    assert isinstance(answer.error, InvalidParameter)
    assert said in str(answer.error)
    fits(ask(engine, asking_for(PERSON, model="demo")).wait(), PERSON)


def test_a_schema_belongs_to_the_kept_answer(start: Start) -> None:
    engine = start(cache_enabled=True)
    other = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    for schema, from_cache in [(PERSON, False), (other, False), (PERSON, True)]:
        answer = ask(engine, asking_for(schema, model="demo")).wait()
        fits(answer, schema)
        assert answer.finished is not None
        assert answer.finished.from_cache == from_cache
