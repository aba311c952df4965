"""Masks of a grammar, for the kinds of vocabularies that models have."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
import tokenizers

from engine.errors import InvalidParameter
from engine.prompts import Detokenizer, Tokenizer
from engine.sampling import grammar
from engine.sampling.grammar import Grammars, Matcher, constrain, masks
from engine.sampling.numerals import Numerals
from engine.sampling.schema import read_schema
from tests.engine.schemas import random_schema
from tests.prompts import checkpoints

EOS = 0


def vocabulary(kind: str) -> tokenizers.Tokenizer:
    return checkpoints.byte_level(["<eos>"]) if kind == "bytes" else checkpoints.sentencepiece(["<eos>", "<unk>"])


def allowed(matcher: Matcher) -> list[int]:
    words = masks([matcher])[0]
    tokens: list[int] = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
    return tokens


def matcher_of(grammars: Grammars, schema: str) -> Matcher:
    matcher = grammars.matcher(schema)
    assert matcher is not None
    return matcher


def spoken(tokenizer: Tokenizer, matcher: Matcher, seed: int) -> str:
    """What random tokens of those that the grammar allows spell."""
    random = np.random.default_rng(seed)
    detokenizer, text = Detokenizer(tokenizer), ""
    for _ in range(3000):
        token = int(random.choice(allowed(matcher)))
        if token == EOS:
            return text + detokenizer.flush()
        matcher.commit(token)
        text += detokenizer.push([token])
    raise AssertionError(f"no end: {text}")


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_whatever_is_chosen_of_the_allowed_tokens_fits(kind: str) -> None:
    backend = vocabulary(kind)
    tokenizer = Tokenizer(backend)
    grammars = Grammars(tokenizer, backend.get_vocab_size(), [EOS])
    for seed in range(15):
        schema = random_schema(seed)
        text = spoken(tokenizer, matcher_of(grammars, json.dumps(schema)), seed)
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def test_a_models_vocabulary_may_be_wider_or_narrower_than_its_tokenizers() -> None:
    backend = vocabulary("bytes")
    size = backend.get_vocab_size()
    for vocab in (size + 70, size - 3):
        matcher = matcher_of(Grammars(Tokenizer(backend), vocab, [EOS]), '{"const": true}')
        logits = np.zeros((2, vocab), np.float32)
        constrain(logits, {1: matcher})
        assert np.flatnonzero(np.isfinite(logits[1])).tolist() == [one for one in allowed(matcher) if one < vocab]
        assert np.isfinite(logits[0]).all()
        assert not np.isfinite(logits[1, size:]).any()


def test_only_the_end_may_follow_what_is_complete() -> None:
    tokenizer = Tokenizer(vocabulary("bytes"))
    matcher = matcher_of(Grammars(tokenizer, tokenizer.size, [EOS, 7]), '{"const": 1}')
    assert [tokenizer.decode([token]) for token in allowed(matcher)] == ["1"]
    matcher.commit(allowed(matcher)[0])
    assert allowed(matcher) == [EOS, 7]
    matcher.commit(EOS)
    matcher.commit(9)  # a step too many
    matcher.find_problem()
    assert not matcher.problem


def test_one_sequence_does_not_move_another() -> None:
    tokenizer = Tokenizer(vocabulary("bytes"))
    grammars = Grammars(tokenizer, tokenizer.size, [EOS])
    first, second = (matcher_of(grammars, '{"enum": ["a", "b"]}') for _ in range(2))
    before = allowed(second)
    first.commit(before[0])
    assert allowed(second) == before != allowed(first)


def test_masks_are_the_same_made_together_and_one_by_one() -> None:
    tokenizer = Tokenizer(vocabulary("bytes"))
    grammars = Grammars(tokenizer, tokenizer.size, [EOS])
    random = np.random.default_rng(0)
    schemas = [random_schema(seed) for seed in range(9)] + [{"type": "number"}, {"type": "string", "maxLength": 6}]
    together, alone = ([matcher_of(grammars, json.dumps(schema)) for schema in schemas] for _ in range(2))
    for _ in range(40):
        made = masks(together)
        for words, *both in zip(made, together, alone, strict=True):
            assert np.array_equal(words, masks(both[1:])[0])
            token = int(random.choice(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))))
            for one in both:
                one.commit(token)


def test_masks_are_those_that_every_token_looked_at_gives() -> None:
    """The shortcuts by the length of what a string may still hold change no mask."""
    tokenizer, random = Tokenizer(vocabulary("pieces")), np.random.default_rng(1)
    grammars = Grammars(tokenizer, tokenizer.size, [EOS])
    for shortest, longest in ((0, 3), (2, 9), (8, 60), (0, 14), (31, 34)):
        schema = {"type": "array", "minItems": 2,
                  "items": {"type": "string", "minLength": shortest, "maxLength": longest}}  # fmt: skip
        matcher = matcher_of(grammars, json.dumps(schema))
        plain = llguidance.LLMatcher(matcher.vocabulary._tokens.with_slices([]), _grammar(schema), log_level=0)
        for _ in range(60):
            tokens = allowed(matcher)
            bits = np.unpackbits(np.frombuffer(plain.compute_bitmask(), np.uint8), bitorder="little")
            assert tokens == np.flatnonzero(bits).tolist()
            token = int(random.choice(tokens))
            if token == EOS:
                break
            matcher.commit(token)
            plain.consume_token(token)


def _grammar(schema: dict[str, Any]) -> str:
    options: llguidance._lib.JsonCompileOptions = {"whitespace_pattern": grammar._WHITESPACE}
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def test_a_token_that_does_not_fit_leaves_a_problem_and_no_token() -> None:
    tokenizer = Tokenizer(vocabulary("bytes"))
    matcher = matcher_of(Grammars(tokenizer, tokenizer.size, [EOS]), '{"const": 1}')
    matcher.commit(tokenizer.encode("2")[0])
    assert allowed(matcher) == []
    matcher.find_problem()
    assert matcher.problem.startswith("the JSON schema is too complex")


@pytest.mark.parametrize(
    ("text", "room"),
    [
        (b"", 20),
        (b"-12", 18),
        (b'{"1234": 5', 19),
        (b"12.345", 17),
        (b"1e1", 1),
        (b"1e-99", 0),
        (b"[1e9,2", 19),
        (b'"\\"123', 20),
        (b'"\\\\"123', 17),
        (b"true,1", 19),
        (b"1e5}1", 19),
    ],
)
def test_how_many_digits_may_follow(text: bytes, room: int) -> None:
    numerals = Numerals()
    numerals.push(text)
    assert numerals.room == room


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"type": "object", "properties": {"a": {}}}, True),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}}, False),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, False),
        ({"type": "object", "properties": {"a": {}}, "minProperties": 3}, False),
        ({"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["b"]}]}, False),
        ({"type": "object", "allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, False),
        ({"type": "object"}, False),
        ({"enum": [{"properties": {"a": 1}}]}, False),
        ({"const": {"properties": {"a": 1}}}, False),
        ({"properties": {"properties": {"type": "integer"}}}, True),
    ],
)
def test_objects_that_name_their_members_get_no_others(schema: dict[str, Any], closed: bool) -> None:
    narrowed = json.loads(read_schema(json.dumps(schema)))
    assert (narrowed != schema) == closed
    assert narrowed == schema | ({"additionalProperties": False} if closed else {})


def test_a_schemas_order_and_unicode_are_kept() -> None:
    text = '{"type": "object", "properties": {"z": {"const": "ü"}, "a": {}}, "additionalProperties": true}'
    assert read_schema(text) == text


def test_a_huge_schema_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="characters"):
        read_schema('{"description": "' + "a" * (1 << 20) + '"}')


@pytest.mark.parametrize("eos", [[], [151645]])
def test_a_model_without_a_last_token_says_so(eos: list[int]) -> None:
    backend = vocabulary("bytes")
    with pytest.raises(InvalidParameter, match="set eos_token_id in its generation_config"):
        Grammars(Tokenizer(backend), backend.get_vocab_size(), eos).matcher("{}")
    assert Grammars(Tokenizer(backend), backend.get_vocab_size(), [EOS, *eos]).matcher("{}") is not None
