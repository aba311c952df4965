"""The engine as a library: what was computed before a restart, and faults inside one request."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError
from engine.job import Job
from engine.request import Chunk, Event, Finished, Image, Message, Request, SamplingParams, Text
from tests.end_to_end.asking import picture


def _request(question: str, max_tokens: int = 8) -> Request:
    message = Message("user", (Image(picture(size=500)), Text(question)))
    return Request("demo", (message,), SamplingParams(max_tokens=max_tokens, ignore_eos=max_tokens > 8))


def _ask(engine: Engine, question: str) -> list[Event]:
    return list(engine.submit(_request(question)))


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


def test_a_fault_in_one_request_ends_that_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(job: Job, tokens: list[int], *, reused: int) -> None:
        calls.append(job)
        if job.sampling.max_tokens == 77 and calls.count(job) == 5:
            raise ValueError("a fault")
        take(job, tokens, reused=reused)

    take, calls = Job.take, list[Job]()
    monkeypatch.setattr(Job, "take", faulty)
    engine = Engine(EngineConfig(storage=tmp_path, threads=1, cache_enabled=False))
    good, bad = engine.submit(_request("what?", 60)), engine.submit(_request("what?", 77))
    with pytest.raises(EngineError, match="a fault"):
        list(bad)
    *_, last = good
    assert isinstance(last, Finished)
    assert last.usage.completion_tokens == 60
    assert _text(_ask(engine, "what shape is in the image?")) == "circle"
    engine.close()


def _forbidden(*_: object, **__: object) -> None:
    raise AssertionError("This must not be computed again.")
