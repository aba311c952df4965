"""One request's life: what it counts, why it ends, what it is refused for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.engine import Engine
from engine.errors import (
    Cancelled,
    CheckpointError,
    ContextOverflow,
    DeadlineExceeded,
    EngineError,
    EngineStopped,
    InvalidImage,
    InvalidRequest,
    QueueFull,
    UnknownModel,
)
from engine.request import Image, Message, Request, SamplingParams, Text
from tests.engine.asking import Answer, ask, picture, replica, request
from tests.engine.conftest import Start

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def engine(start: Start) -> Engine:
    return start()


def slow_down(engine: Engine, seconds: float) -> None:
    """Every decode step takes at least this long."""
    decoder: Any = replica(engine, "demo").runner.decoder
    decode = decoder.decode

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return decode(*arguments)

    decoder.decode = slow


def test_a_question_is_answered_and_counted(engine: Engine) -> None:
    sample = (ROOT / "samples" / "blue_triangle.png").read_bytes()
    answer = ask(engine, request(sample, "what shape is in the image?")).wait()
    assert answer.result == ("triangle", "stop", len("triangle") + 1)
    assert answer.finished is not None
    usage, timings = answer.finished.usage, answer.finished.timings
    assert usage.image_tokens == engine.load("demo").artifact.spec.vision.tokens_per_tile  # type: ignore[union-attr]
    assert usage.prompt_tokens > usage.image_tokens + len("what shape is in the image?")
    assert 0 <= timings.prepared_s <= timings.first_token_s <= timings.total_s


def test_the_parts_of_the_first_tokens_time_add_up(engine: Engine) -> None:
    finished = ask(engine, request(picture(1), "what shape?", max_tokens=3)).wait().finished
    assert finished is not None
    timings = finished.timings
    assert min(timings.queued_s, timings.prefill_s) >= 0
    assert timings.prepared_s + timings.queued_s + timings.prefill_s == pytest.approx(timings.first_token_s)


def test_waiting_for_a_place_in_the_batch_counts_as_queued(start: Start) -> None:
    engine = start(max_batch_size=1)
    first = ask(engine, request("what?", max_tokens=500, ignore_eos=True, temperature=1.0))
    second = ask(engine, request("what else?", max_tokens=2, temperature=1.0))
    scheduler = replica(engine, "demo").scheduler
    while not scheduler.waiting:
        assert second.finished is None, "it did not wait"
        time.sleep(0.001)
    time.sleep(0.05)
    assert first.finished is None
    assert first.stream is not None
    first.stream.cancel()
    finished = second.wait().finished
    assert finished is not None
    assert finished.timings.queued_s >= 0.05
    assert finished.timings.prepared_s < finished.timings.first_token_s - 0.05


def test_the_counted_tokens_are_those_of_the_prompt(engine: Engine) -> None:
    messages = (
        Message("system", (Text("Be brief."),)),
        Message("user", (Image(picture(1)), Text("what shape?"), Image(picture(2)))),
        Message("assistant", (Text("circle"),)),
        Message("user", (Text("and its colour?"),)),
    )
    answer = ask(engine, Request("demo", messages, SamplingParams(max_tokens=3))).wait()
    assert answer.text is not None
    assert answer.finished is not None
    assert engine.count_tokens("demo", messages) == answer.finished.usage.prompt_tokens


def test_text_alone_is_an_ordinary_request(engine: Engine) -> None:
    assert ask(engine, request("hello")).wait().text


def test_max_tokens_ends_an_answer_with_length(engine: Engine) -> None:
    text, reason, tokens = ask(engine, request("hello", max_tokens=5)).wait().result
    assert (reason, tokens) == ("length", 5)
    assert len(text) == 5


def test_ignoring_the_end_token_gives_exactly_max_tokens(engine: Engine) -> None:
    _, reason, tokens = ask(engine, request(picture(1), "colour?", max_tokens=50, ignore_eos=True)).wait().result
    assert (reason, tokens) == ("length", 50)


def test_a_stop_word_ends_an_answer_and_is_not_part_of_it(engine: Engine) -> None:
    whole = ask(engine, request("hello")).wait().text
    word = whole[10:13]
    text, reason, tokens = ask(engine, request("hello", stop=(word,))).wait().result
    assert text == whole[: whole.index(word)]
    assert reason == "stop"
    assert tokens == whole.index(word) + len(word)


def test_the_start_of_a_stop_word_is_held_back_only_while_it_may_become_one(engine: Engine) -> None:
    whole = ask(engine, request("hello")).wait().text
    answer = ask(engine, request("hello", stop=(whole[-4:] + "never",))).wait()
    assert answer.text == whole


def test_a_seed_repeats_and_another_seed_differs(engine: Engine) -> None:
    def drawn(seed: int) -> str:
        return ask(engine, request("hello", temperature=8.0, seed=seed, max_tokens=40)).wait().text

    assert drawn(1) == drawn(1) != drawn(2)


def test_an_answer_never_runs_over_the_context(start: Start) -> None:
    engine = start(kv_cache_mib=1)
    context = engine.load("demo").context_length
    question = request("x" * (context - 60), max_tokens=1000, ignore_eos=True)
    answer = ask(engine, question).wait()
    assert answer.result[1] == "length"
    assert answer.finished is not None
    assert answer.finished.usage.prompt_tokens + answer.finished.usage.completion_tokens == context


def test_a_prompt_over_the_context_is_refused_with_the_numbers(engine: Engine) -> None:
    with pytest.raises(ContextOverflow, match=r"the prompt is 50\d\d tokens; the context holds 4096"):
        _ = ask(engine, request("x" * 5000)).wait().text


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (request("hello", model="gpt"), UnknownModel, "unknown model 'gpt'; known models: demo"),
        (request(*[b"x"] * 65, "hello"), InvalidRequest, "65 images in one request; the limit is 64"),
    ],
)
def test_what_is_known_at_once_is_refused_at_once(
    engine: Engine, wrong: Request, error: type[EngineError], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.submit(wrong)
    assert ask(engine, request("hello")).wait().text


def test_a_bad_image_fails_its_request_alone(engine: Engine) -> None:
    good, bad = ask(engine, request(picture(1), "shape?")), ask(engine, request(b"no image", "shape?"))
    with pytest.raises(InvalidImage):
        _ = bad.wait().text
    assert good.wait().text


def test_a_text_model_refuses_images_by_name(start: Start, storage: Path) -> None:
    model = start().load("demo")
    without_vision = type(model)(**{name: getattr(model, name) for name in model.__slots__} | {"images": None})
    with pytest.raises(InvalidRequest, match="demo reads text only"):
        without_vision.layouts([Image(picture(1))], 50.0)


def test_a_full_queue_refuses_at_once_and_takes_again_later(start: Start) -> None:
    engine = start(max_batch_size=1, max_waiting=1)
    slow_down(engine, 0.02)
    open_requests = [ask(engine, request("hello", max_tokens=20, seed=seed, temperature=1.0)) for seed in range(2)]
    with pytest.raises(QueueFull, match=r"the queue is full \(1 waiting\)"):
        ask(engine, request("hello"))
    assert all(answer.wait().text for answer in open_requests)
    assert ask(engine, request("hello", max_tokens=2)).wait().text


def test_a_request_ends_at_its_deadline_and_frees_its_row(start: Start) -> None:
    engine = start()
    slow_down(engine, 0.02)
    with pytest.raises(DeadlineExceeded):
        _ = ask(engine, request("hello", max_tokens=4000, ignore_eos=True, timeout_s=0.3)).wait().text
    assert_idle(engine)


def test_a_deadline_holds_while_the_model_loads(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> object:
        time.sleep(1.5)
        raise CheckpointError("too late")

    monkeypatch.setattr("engine.engine.load_model", never)
    with pytest.raises(DeadlineExceeded):
        _ = ask(start(), request("hello", timeout_s=0.2)).wait().text


def test_a_cancelled_request_stops_costing_work(start: Start) -> None:
    engine = start()
    slow_down(engine, 0.01)
    answer = ask(engine, request("hello", max_tokens=4000, ignore_eos=True))
    while not answer.chunks:
        time.sleep(0.01)
    assert answer.stream is not None
    answer.stream.cancel()
    assert isinstance(answer.wait().error, Cancelled)
    assert_idle(engine)


def test_a_cancelled_deterministic_request_is_forgotten(start: Start, tmp_path: Path) -> None:
    engine = start(storage=tmp_path, cache_enabled=True)
    slow_down(engine, 0.01)
    answer = ask(engine, request("hello", max_tokens=4000, ignore_eos=True))
    while not answer.chunks:
        time.sleep(0.01)
    assert len(engine._jobs) == 1
    assert answer.stream is not None
    answer.stream.cancel()
    assert_idle(engine)
    assert not engine._jobs


def assert_idle(engine: Engine) -> None:
    limit = time.monotonic() + 10
    while (status := engine.status())["models"]["demo"]["replicas"][0]["running"] or status["open_requests"]:
        assert time.monotonic() < limit, status
        time.sleep(0.01)
    assert status["models"]["demo"]["replicas"][0]["kv_blocks_used"] == 0


def test_a_failing_step_ends_its_requests_and_the_next_one_works(engine: Engine) -> None:
    decoder: Any = replica(engine, "demo").runner.decoder
    decode = decoder.decode

    def failing(*arguments: Any) -> Any:
        decoder.decode = decode
        raise MemoryError("no room for the scratch buffer")

    decoder.decode = failing
    with pytest.raises(EngineError, match="running the model failed: no room for the scratch buffer"):
        _ = ask(engine, request("hello")).wait().text
    assert ask(engine, request("hello")).wait().text


def test_a_failing_encoder_ends_its_requests_and_the_next_one_works(engine: Engine) -> None:
    encoder: Any = replica(engine, "demo").runner.tower
    assert encoder is not None
    encode = encoder.encode

    def failing(*arguments: Any) -> Any:
        encoder.encode = encode
        raise RuntimeError("a broken tower")

    encoder.encode = failing
    with pytest.raises(EngineError, match="encoding the image failed: a broken tower"):
        _ = ask(engine, request(picture(5), "shape?")).wait().text
    assert ask(engine, request(picture(5), "shape?")).wait().text


def test_output_that_is_no_number_is_an_error_of_that_request(engine: Engine) -> None:
    decoder: Any = replica(engine, "demo").runner.decoder
    prefill = decoder.prefill

    def broken(*arguments: Any, **options: Any) -> Any:
        decoder.prefill = prefill
        return np.full_like(prefill(*arguments, **options), np.nan)

    decoder.prefill = broken
    with pytest.raises(EngineError, match="not a number"):
        _ = ask(engine, request("hello")).wait().text
    assert ask(engine, request("hello")).wait().text


def test_a_model_that_could_not_be_loaded_is_tried_again(engine: Engine, storage: Path) -> None:
    folder = storage / "models" / "half"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _ = ask(engine, request("hello", model="half")).wait().text
    assert "half" not in engine.status()["models"]
    for file in (ROOT / "demo").iterdir():
        (folder / file.name).symlink_to(file)
    assert ask(engine, request("hello", model="half", max_tokens=3)).wait().text


def test_closing_ends_open_requests(start: Start) -> None:
    engine = start()
    slow_down(engine, 0.02)
    answers = [ask(engine, request("hello", max_tokens=4000, ignore_eos=True, seed=seed)) for seed in range(3)]
    engine.close()
    assert all(isinstance(answer.wait().error, EngineStopped) for answer in answers)
    with pytest.raises(EngineStopped):
        engine.submit(request("hello"))


def test_a_stream_can_be_iterated(engine: Engine) -> None:
    events = list(engine.submit(request("hello", max_tokens=4)))
    answer = Answer()
    for event in events:
        answer.take(event)
    assert answer.result[1:] == ("length", 4)
