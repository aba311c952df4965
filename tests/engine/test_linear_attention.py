"""Sequences with a state of linear attention, through the whole engine: batched, set back and reused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidConfig
from tests.engine.asking import ask, mixed_requests, note_set_backs, picture, replica, request
from tests.engine.conftest import Start
from tests.engine.test_vision_families import qwen3_5
from tests.runtime.models import randomise

MODEL = "tiny-qwen3-5"
SIZES = [(64, 64), (130, 80), (90, 140)]


def with_model(folder: Path) -> Path:
    """The storage folder, with MODEL in it."""
    tiny = qwen3_5(folder / "models" / MODEL)
    randomise(tiny.model).save_pretrained(tiny.reference.folder)
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_model(tmp_path_factory.mktemp("storage"))


def test_64_requests_together_give_exactly_the_tokens_that_each_gives_alone(start: Start) -> None:
    alone = start(precision="int8", max_batch_size=1)
    expected = [ask(alone, one).wait().result for one in mixed_requests(64, MODEL, sizes=SIZES)]
    engine = start(precision="int8")
    for _ in range(3):  # prefixes are there the second time, and where they part a state the third
        answers = [ask(engine, one) for one in mixed_requests(64, MODEL, sizes=SIZES)]
        assert [answer.wait().result for answer in answers] == expected
    assert max(answer.finished.usage.reused_tokens for answer in answers if answer.finished) > 0


@pytest.mark.parametrize("chunk", [16, 57])
def test_the_size_of_prefill_chunks_changes_nothing(start: Start, chunk: int) -> None:
    def told(**settings: Any) -> list[tuple[str, str, int]]:
        engine = start(**settings)
        answers = [ask(engine, one) for one in mixed_requests(16, MODEL, sizes=SIZES)]
        return [answer.wait().result for answer in answers]

    assert told(prefill_chunk=chunk) == told()


def test_sequences_that_are_set_back_say_the_same(start: Start) -> None:
    questions = [
        request(picture(seed), "read " * 20, model=MODEL, max_tokens=100, ignore_eos=True, temperature=1.0, seed=seed)
        for seed in range(12)
    ]
    wide = start(precision="fp32")
    expected = [ask(wide, question).wait().result for question in questions]
    tight = start(precision="fp32", kv_cache_mib=1)
    scheduler: Any = replica(tight, MODEL).scheduler
    scheduler.kv.blocks = 60  # some sequences of 200 tokens, with their states
    set_back = note_set_backs(scheduler)
    answers = [ask(tight, question) for question in questions]
    assert [answer.wait().result for answer in answers] == expected
    assert any(set_back), "no sequence with output was set back"


def test_a_prompt_asked_again_goes_on_from_a_state_and_says_the_same(start: Start) -> None:
    engine = start()
    question = request(picture(3), "what shape is in the image? " * 8, model=MODEL, max_tokens=24, ignore_eos=True)
    answers = [ask(engine, question).wait() for _ in range(3)]
    assert answers[0].result == answers[1].result == answers[2].result
    usage = answers[2].finished.usage if answers[2].finished else None
    assert usage is not None
    assert usage.reused_tokens >= usage.prompt_tokens - 16


def test_memory_that_holds_no_state_is_refused_with_what_to_raise(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.spec.DeltaNetSpec.state_bytes", property(lambda _: 3 << 20))
    with pytest.raises(InvalidConfig, match="kv_cache_mib is 2, but tiny-qwen3-5 keeps 3 MiB of each sequence"):
        start(kv_cache_mib=2).load(MODEL)
