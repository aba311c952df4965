"""What was computed before a restart is not computed again."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Chunk, Event, Finished, Image, Message, Request, SamplingParams, Text
from tests.end_to_end.asking import picture


def _ask(engine: Engine, question: str) -> list[Event]:
    message = Message("user", (Image(picture(size=500)), Text(question)))
    return list(engine.submit(Request("demo", (message,), SamplingParams(max_tokens=8))))


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))


def test_a_known_image_is_not_decoded_again_and_a_known_answer_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(storage=tmp_path, threads=1)
    first = Engine(config)
    known = _text(_ask(first, "what color is the shape?"))
    first.close()

    again = Engine(config)
    monkeypatch.setattr("engine.model.decode_image", _forbidden)
    monkeypatch.setattr("engine.runtime.Encoder.encode", _forbidden)
    *_, new = _ask(again, "what shape is in the image?")
    assert isinstance(new, Finished)
    assert not new.from_cache
    monkeypatch.setattr("engine.runtime.Decoder.prefill", _forbidden)
    events = _ask(again, "what color is the shape?")
    assert _text(events) == known
    assert isinstance(events[-1], Finished)
    assert events[-1].from_cache
    again.close()


def _forbidden(*_: object, **__: object) -> None:
    raise AssertionError("This must not be computed again.")
