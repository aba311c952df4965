"""Work that was done is not done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from tests.engine.asking import ask, picture, replica, request
from tests.engine.conftest import Start


def count_calls(owner: Any, name: str) -> list[None]:
    calls: list[None] = []
    original = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return original(*arguments, **options)

    setattr(owner, name, counted)
    return calls


@pytest.fixture
def cached(start: Start, tmp_path: Path) -> Engine:
    return start(storage=tmp_path, cache_enabled=True)


def test_identical_deterministic_requests_run_once(cached: Engine) -> None:
    prefills = count_calls(replica(cached, "demo").runner.decoder, "prefill")
    question = request(picture(1), "what shape is in the image?", max_tokens=60, ignore_eos=True)
    answers = [ask(cached, question) for _ in range(20)]
    assert len({answer.wait().result for answer in answers}) == 1
    assert len(prefills) == 1


def test_one_of_several_callers_may_leave(cached: Engine) -> None:
    question = request(picture(1), "what shape is in the image?", max_tokens=200, ignore_eos=True)
    leaving, staying = ask(cached, question), ask(cached, question)
    assert leaving.stream is not None
    leaving.stream.cancel()
    assert staying.wait().result[1:] == ("length", 200)


def test_an_answer_outlives_the_engine(start: Start, tmp_path: Path) -> None:
    question = request(picture(1), "what shape is in the image?")
    first = start(storage=tmp_path, cache_enabled=True)
    expected = ask(first, question).wait().result
    first.close()
    second = start(storage=tmp_path, cache_enabled=True)
    prefills = count_calls(replica(second, "demo").runner.decoder, "prefill")
    answer = ask(second, question).wait()
    assert answer.result == expected
    assert answer.finished is not None
    assert answer.finished.from_cache
    assert not prefills


@pytest.mark.parametrize(
    "changed",
    [
        request(picture(1), "what shape is in the image", max_tokens=9),
        request(picture(2), "what shape is in the image?", max_tokens=9),
        request(picture(1), "what shape is in the image?", max_tokens=8),
        request(picture(1), "what shape is in the image?", max_tokens=9, stop=("x",)),
        request(picture(1), "what shape is in the image?", max_tokens=9, temperature=1.0, seed=1),
        request("what shape is in the image?", picture(1), max_tokens=9),
    ],
)
def test_whatever_changes_the_answer_is_another_answer(cached: Engine, changed: Any) -> None:
    assert ask(cached, request(picture(1), "what shape is in the image?", max_tokens=9)).wait().text
    answer = ask(cached, changed).wait()
    assert answer.finished is not None
    assert not answer.finished.from_cache


def test_a_drawn_answer_without_a_seed_is_never_kept(cached: Engine) -> None:
    question = request("hello", temperature=1.0)
    for _ in range(2):
        answer = ask(cached, question).wait()
        assert answer.finished is not None
        assert not answer.finished.from_cache


def test_a_known_image_is_not_encoded_again_after_a_restart(start: Start, tmp_path: Path) -> None:
    first = start(storage=tmp_path, cache_enabled=True)
    before = ask(first, request(picture(1), "what colour is it?")).wait().result
    first.close()
    second = start(storage=tmp_path, cache_enabled=True)
    encoder = replica(second, "demo").runner.tower
    encodes = count_calls(encoder, "encode")
    assert ask(second, request(picture(1), "which shape?", max_tokens=4)).wait().text
    assert not encodes
    fresh = start(storage=tmp_path / "fresh")
    assert ask(fresh, request(picture(1), "what colour is it?")).wait().result == before


def test_without_the_cache_nothing_is_written_or_shared(start: Start, tmp_path: Path) -> None:
    engine = start(storage=tmp_path, cache_enabled=False)
    prefills = count_calls(replica(engine, "demo").runner.decoder, "prefill")
    for _ in range(2):
        assert ask(engine, request(picture(1), "what shape?")).wait().text
    assert len(prefills) == 2
    assert not (tmp_path / "cache").exists()
