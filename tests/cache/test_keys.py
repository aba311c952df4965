from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from engine.cache import answer_key, feature_key
from engine.cache.keys import _encode
from engine.request import SamplingParams

SEEDED = SamplingParams(temperature=0.7, seed=1)
CHANGES: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "seed": 2,
    "max_tokens": 5,
    "stop": ("a",),
    "ignore_eos": True,
    "json_object": True,
    "json_schema": '{"type": "object"}',
}
TOKENS = np.array([1, 2, 3])


def key(params: SamplingParams = SEEDED, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "model_digest": "m",
        "token_ids": TOKENS,
        "image_keys": [b"i"],
        "params": params,
    } | changes
    return answer_key(**fields)


def test_every_sampling_parameter_is_known_to_this_test() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_sampling_parameter_changes_the_key(name: str) -> None:
    assert key(dataclasses.replace(SEEDED, **{name: CHANGES[name]})) != key()


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "n"},
        {"token_ids": np.array([1, 2])},
        {"token_ids": np.array([1, 3, 2])},
        {"image_keys": []},
        {"image_keys": [b"j"]},
        {"image_keys": [b"i", b"i"]},
    ],
    ids=str,
)
def test_model_prompt_and_images_change_the_key(change: dict[str, Any]) -> None:
    assert key(**change) != key()
    assert len(key(**change)) == 32


def test_neighbouring_fields_cannot_be_confused() -> None:
    assert key(image_keys=[b"ab", b"c"]) != key(image_keys=[b"a", b"bc"]) != key(image_keys=[b"abc"])
    stops = [("ab",), ("a", "b"), ("ba",)]
    assert len({key(SamplingParams(stop=stop)) for stop in stops}) == 3
    values: list[object] = [None, 0, False, 0.0, "", b"", (), "0", b"0", (None,), ((),), 1, True, 1.0]
    assert len({_encode(value) for value in values}) == len(values)


def test_the_same_request_written_differently_has_one_key() -> None:
    assert key(token_ids=TOKENS.astype(np.int32)) == key() == key(image_keys=(b"i",))
    assert key(SamplingParams(temperature=1, seed=1)) == key(SamplingParams(temperature=1.0, seed=1))
    assert key(SamplingParams(presence_penalty=-0.0)) == key(SamplingParams(presence_penalty=0))


def test_what_only_matters_to_a_draw_does_not_split_greedy_requests() -> None:
    greedy = SamplingParams()
    for change in ({"top_p": 0.5}, {"seed": 4}, {"top_k": 9}, {"min_p": 0.2}, {"temperature": 0.9, "top_k": 1}):
        assert key(dataclasses.replace(greedy, **change)) == key(greedy)
    assert key(dataclasses.replace(greedy, frequency_penalty=0.1)) != key(greedy)


def test_a_key_is_the_same_in_every_process() -> None:
    assert key().hex() == KNOWN
    assert feature_key(b"i", "m").hex() == KNOWN_FEATURE


def test_an_answer_drawn_without_a_seed_has_no_key() -> None:
    with pytest.raises(ValueError, match="seed"):
        key(SamplingParams(temperature=0.5))


def test_feature_keys_hold_image_and_encoder() -> None:
    assert len({feature_key(b"a", "b"), feature_key(b"b", "b"), feature_key(b"a", "c"), feature_key(b"", "ab")}) == 4


KNOWN = "e2dac51eda7b99b34d491684ce78f64dec5be887d4c8213573fdc50c2ac9bc9c"
KNOWN_FEATURE = "f05586c83d58b6c17441bd30fe2461b5bb2d03ea106b840fc608778b65ff3f69"
