"""Nothing but its own request decides what a sequence says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine.engine import Engine
from tests.engine.asking import ask, mixed_requests, note_set_backs, picture, replica, request
from tests.engine.conftest import Start

SIZES = {
    "demo": [(64, 64), (300, 80), (33, 90)],
    "tiny-smolvlm": [(20, 20), (90, 40), (64, 90)],
    "tiny-qwen2-vl": [(56, 56), (120, 80), (84, 140)],
    "tiny-gemma3": [(20, 20), (90, 41)],
}


def alone(engine: Engine, model: str, count: int) -> list[tuple[str, str, int]]:
    return [ask(engine, one).wait().result for one in mixed_requests(count, model, sizes=SIZES[model])]


def together(engine: Engine, model: str, count: int) -> list[tuple[str, str, int]]:
    answers = [ask(engine, one) for one in mixed_requests(count, model, sizes=SIZES[model])]
    return [answer.wait().result for answer in answers]


def batch_sizes(engine: Engine, model: str) -> list[int]:
    """From now on, the rows of every decode call."""
    sizes: list[int] = []
    decoder: Any = replica(engine, model).runner.decoder
    decode = decoder.decode

    def counted(rows: Sequence[int], *arguments: Any) -> Any:
        sizes.append(len(rows))
        return decode(rows, *arguments)

    decoder.decode = counted
    return sizes


@pytest.mark.parametrize(
    ("model", "precision"),
    [("demo", "int8"), ("demo", "fp32"), ("tiny-smolvlm", "fp32"), ("tiny-qwen2-vl", "int8"), ("tiny-gemma3", "int8")],
)
def test_64_requests_together_give_exactly_the_tokens_that_each_gives_alone(
    start: Start, model: str, precision: str
) -> None:
    expected = alone(start(precision=precision, max_batch_size=1), model, 64)
    engine = start(precision=precision)
    sizes = batch_sizes(engine, model)
    assert together(engine, model, 64) == expected
    assert max(sizes) >= 8, f"nothing was batched: {sizes}"


@pytest.mark.parametrize("chunk", [16, 57])
def test_the_size_of_prefill_chunks_changes_nothing(start: Start, chunk: int) -> None:
    expected = together(start(), "tiny-qwen2-vl", 24)
    assert together(start(prefill_chunk=chunk), "tiny-qwen2-vl", 24) == expected


def test_a_reused_prefix_changes_nothing(start: Start) -> None:
    engine = start()
    question = request(picture(3), "what shape is in the image? " * 5, max_tokens=24, ignore_eos=True)
    first = ask(engine, question).wait()
    second = ask(engine, question).wait()
    assert first.result == second.result
    assert first.finished is not None
    assert second.finished is not None
    assert first.finished.usage.reused_tokens == 0
    assert second.finished.usage.reused_tokens >= second.finished.usage.prompt_tokens - 16


def test_sequences_that_are_set_back_say_the_same(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    questions = [
        request(picture(seed), "read the word", max_tokens=100, ignore_eos=True, temperature=1.0, seed=seed)
        for seed in range(12)
    ]
    wide = start()
    expected = [ask(wide, question).wait().result for question in questions]
    tight = start(kv_cache_mib=1)  # 512 tokens of the demo: three sequences of 160
    scheduler: Any = replica(tight, "demo").scheduler
    set_back = note_set_backs(scheduler)
    answers = [ask(tight, question) for question in questions]
    assert [answer.wait().result for answer in answers] == expected
    assert any(set_back), "no sequence with output was set back"
