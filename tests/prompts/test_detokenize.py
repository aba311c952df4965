"""Text of output tokens as they come."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers

from engine.prompts import Detokenizer, Tokenizer
from tests.prompts.checkpoints import SENTENCES, byte_level, sentencepiece

TEXTS = [*SENTENCES, "👩‍👩‍👧 e\u0301 \ufffd ok", " leading and trailing ", "", "\n\n", "नमस्ते"]
SPECIAL = ["<unk>", "<s>", "</s>"]


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def backend(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    made = request.param(SPECIAL)
    assert isinstance(made, tokenizers.Tokenizer)
    return made


def pushed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push([token]) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(text: str, backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(backend)
    pieces = pushed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_comes_whole(backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(backend)
    pieces = [piece for piece in pushed(tokenizer, tokenizer.encode("x🦜y")) if piece]
    assert pieces == ["x", "🦜", "y"]
    assert len(tokenizer.encode("x🦜y")) >= 5


def test_several_tokens_at_once_give_the_same_text(backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(backend)
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(SENTENCES[3])
    text = "".join(detokenizer.push(ids[start : start + 3]) for start in range(0, len(ids), 3))
    assert text + detokenizer.flush() == SENTENCES[3]


@pytest.mark.parametrize("seed", range(30))
def test_random_byte_level_tokens_give_what_decoding_all_gives(seed: int) -> None:
    tokenizer = Tokenizer(byte_level_backend())
    ids = np.random.default_rng(seed).integers(0, 520, 80).tolist()
    assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)


def byte_level_backend(made: list[tokenizers.Tokenizer] = []) -> tokenizers.Tokenizer:  # noqa: B006 - made once
    if not made:
        made.append(byte_level(SPECIAL))
    return made[0]


def test_special_tokens_have_no_text_and_hide_no_space(backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(backend)
    ids = [1, *tokenizer.encode("a quick"), 2, 1, *tokenizer.encode("fox")[-1:], 2]
    assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)
    assert "</s>" not in tokenizer.decode(ids)
    assert Detokenizer(tokenizer).push([99_999]) == ""


def test_bytes_that_are_no_text_do_not_hold_back_the_stream(backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(backend)
    byte = backend.token_to_id("<0xFF>") or backend.token_to_id("ÿ")
    assert byte is not None
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push([byte]) for _ in range(50)).count("\ufffd") >= 40


def test_an_unfinished_character_comes_with_flush(backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("ok🦜")[:-1]
    pieces = pushed(tokenizer, ids)
    assert "".join(pieces[:-1]) == "ok"
    assert set(pieces[-1]) == {"\ufffd"}
