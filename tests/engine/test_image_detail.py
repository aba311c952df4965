"""An image of low detail costs fewer tokens and is another image to every cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.request import Detail, Image, Message, Request, SamplingParams, Text
from tests.engine.asking import ask, picture
from tests.engine.conftest import Start

SIZES = {"tiny-smolvlm": (200, 150), "tiny-qwen2-vl": (900, 700)}
DETAILS: tuple[Detail, ...] = ("low", "high")


def about(detail: Detail, model: str) -> Request:
    parts = (Image(picture(1, SIZES[model]), detail), Text("what is it?"))
    return Request(model, (Message("user", parts),), SamplingParams(max_tokens=4, ignore_eos=True))


@pytest.fixture
def own_storage(storage: Path, tmp_path: Path) -> Path:
    """The tiny models with limits that leave low detail a choice, and caches of their own."""
    shutil.copytree(storage / "models", tmp_path / "models")
    for file in (tmp_path / "models" / "tiny-qwen2-vl").glob("*processor_config.json"):
        file.write_text(file.read_text().replace(str(28 * 28 * 30), str(28 * 28 * 700)))
    return tmp_path


@pytest.mark.parametrize("model", SIZES)
def test_low_detail_is_fewer_tokens_and_another_answer_in_the_cache(
    start: Start, own_storage: Path, model: str
) -> None:
    engine = start(storage=own_storage, cache_enabled=True)
    asked = {detail: ask(engine, about(detail, model)).wait().finished for detail in DETAILS}
    low, high = asked["low"], asked["high"]
    assert low is not None
    assert high is not None
    assert 0 < low.usage.image_tokens < high.usage.image_tokens
    assert not high.from_cache
    for detail, first in zip(DETAILS, (low, high), strict=True):
        again = ask(engine, about(detail, model)).wait().finished
        assert again is not None
        assert again.from_cache
        assert again.usage == first.usage


@pytest.mark.parametrize("model", SIZES)
def test_tokens_are_counted_by_detail(start: Start, own_storage: Path, model: str) -> None:
    engine = start(storage=own_storage)
    for detail in DETAILS:
        asked = about(detail, model)
        finished = ask(engine, asked).wait().finished
        assert finished is not None
        assert engine.count_tokens(model, asked.messages) == finished.usage.prompt_tokens
