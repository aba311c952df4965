"""Videos are worked on once, beside other requests, and their troubles end their own request with a sentence."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.engine import Engine
from engine.errors import Cancelled, ContextOverflow, DeadlineExceeded, InvalidRequest, InvalidVideo
from engine.preprocess import video_file
from engine.request import Part, Request, Video, VideoUrl
from tests.engine.asking import about, ask, picture, replica, request
from tests.engine.conftest import Start
from tests.engine.test_caching import count_calls
from tests.engine.test_image_urls import Images
from tests.host.waiting import eventually
from tests.preprocess.films import film

MODEL = "tiny-qwen2-vl"


@pytest.fixture
def cached(start: Start, storage: Path, tmp_path: Path) -> Engine:
    """With caches of its own."""
    shutil.copytree(storage / "models" / MODEL, tmp_path / "models" / MODEL)
    return start(
        storage=tmp_path, cache_enabled=True, preprocess_workers=2, allow_private_images="true", precision="fp32"
    )


def question(*shown: Part, text: str = "What?", model: str = MODEL, **sampling: Any) -> Request:
    return about(*shown, text=text, model=model, **{"max_tokens": 10, "ignore_eos": True} | sampling)


@pytest.fixture(scope="module")
def video() -> Video:
    return Video(film(120, (90, 64), seed=1).file)


def test_features_and_answers_of_a_video_are_kept(cached: Engine, video: Video) -> None:
    model = cached.load(MODEL)
    assert model.videos is not None
    encoded = count_calls(replica(cached, MODEL).runner, "encode")
    first = ask(cached, question(video)).wait()
    again = ask(cached, question(video)).wait()
    assert again.result == first.result
    assert again.finished is not None
    assert again.finished.from_cache
    assert cached._features is not None
    assert cached._features.flush()
    decoded: list[None] = []
    model.videos.process = lambda *_: decoded.append(None)  # type: ignore[method-assign,assignment]
    other = ask(cached, question(video, text="Another question?")).wait()
    assert other.error is None
    assert (len(encoded), decoded) == (1, [])


def test_a_prompt_that_begins_with_the_same_video_is_reused(start: Start, video: Video) -> None:
    engine = start(precision="fp32")
    expected = ask(start(precision="fp32"), question(video, text="Which word?")).wait().result
    assert ask(engine, question(video)).wait().error is None
    answer = ask(engine, question(video, text="Which word?")).wait()
    assert answer.result == expected
    assert answer.finished is not None
    assert answer.finished.usage.image_tokens > 40
    assert answer.finished.usage.reused_tokens >= answer.finished.usage.image_tokens - 16
    other = Video(film(120, (90, 64), seed=2).file)  # of the same shape
    answer = ask(engine, question(other, text="Which word?")).wait()
    assert answer.finished is not None
    assert answer.finished.usage.reused_tokens < 32


def test_a_video_by_url_is_that_video(cached: Engine, video: Video) -> None:
    expected = ask(cached, question(video)).wait().result
    with Images() as server:
        server.files["film.mp4"] = video.data
        url = VideoUrl(server.url("film.mp4").url)
        answer = ask(cached, question(url)).wait()
        assert answer.result == expected
        assert answer.finished is not None
        assert answer.finished.from_cache
        bad = ask(cached, question(VideoUrl(server.url("nothing").url))).wait()
        assert isinstance(bad.error, InvalidVideo)
        server.shutdown()


def test_its_tokens_are_counted_as_they_are_used(cached: Engine, video: Video) -> None:
    asked = question(video, text="How many?")
    answer = ask(cached, asked).wait()
    assert answer.finished is not None
    assert cached.count_tokens(MODEL, asked.messages) == answer.finished.usage.prompt_tokens


def test_fewer_tokens_are_smaller_frames(start: Start) -> None:
    large = Video(film(60, (320, 240), seed=1).file)
    counts = []
    for tokens in (64, 8192):
        engine = start(precision="fp32", max_video_tokens=tokens)
        counts.append(engine.count_tokens(MODEL, question(large).messages))
    assert 0.2 * counts[1] < counts[0] < 0.7 * counts[1]


def test_models_without_video_say_so(start: Start, video: Video) -> None:
    engine = start()
    for model in ("demo", "tiny-gemma3", "tiny-smolvlm"):
        answer = ask(engine, question(video, model=model)).wait()
        assert isinstance(answer.error, InvalidRequest)
        assert f"{model} reads text and images only; choose a model with video" in str(answer.error)


def test_a_bad_video_ends_its_own_request_only(start: Start, video: Video) -> None:
    engine = start(precision="fp32", max_images=2)
    noise = np.random.default_rng(0).bytes(1000)
    asked = [question(Video(data)) for data in (b"", picture(1), video.data[:300], noise)]
    answers = [ask(engine, one) for one in (question(video), *asked)]
    assert answers[0].wait().error is None
    assert all(isinstance(answer.wait().error, InvalidVideo) for answer in answers[1:])
    with pytest.raises(InvalidRequest, match="3 images in one request"):
        engine.submit(question(video, video, video))


def test_a_prompt_that_no_context_holds_is_refused(start: Start, video: Video) -> None:
    answer = ask(start(precision="fp32"), question(*[video] * 30)).wait()
    assert isinstance(answer.error, ContextOverflow)
    assert "use fewer images" in str(answer.error)


def test_requests_without_a_video_do_not_wait_for_one(
    start: Start, video: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(precision="fp32", preprocess_workers=1)
    engine.load(MODEL)
    released = threading.Event()
    original = video_file.video_frames

    def slowly(*arguments: Any) -> Any:
        assert released.wait(30)
        return original(*arguments)

    monkeypatch.setattr(video_file, "video_frames", slowly)
    slow = ask(engine, question(video))
    time.sleep(0.05)
    assert ask(engine, request(picture(1), "What?", model=MODEL, max_tokens=3)).wait().error is None
    assert slow.finished is None
    released.set()
    assert slow.wait().error is None


@pytest.mark.parametrize("ended_by", [Cancelled, DeadlineExceeded])
def test_a_video_that_nobody_waits_for_is_not_decoded_any_further(
    start: Start, video: Video, monkeypatch: pytest.MonkeyPatch, ended_by: type[Exception]
) -> None:
    engine = start(precision="fp32", preprocess_workers=1)
    engine.load(MODEL)
    begun, go_on = threading.Event(), threading.Event()
    frames = []
    upright = video_file._upright

    def waiting(of: video_file.VideoFile, frame: Any) -> Any:
        if of.data == video.data:
            frames.append(frame)
            begun.set()
            assert go_on.wait(30)
        return upright(of, frame)

    monkeypatch.setattr(video_file, "_upright", waiting)
    asked = question(video)
    answer = ask(engine, asked if ended_by is Cancelled else replace(asked, timeout_s=0.5))
    assert begun.wait(30)
    if ended_by is Cancelled:
        assert answer.stream is not None
        answer.stream.cancel()
    assert isinstance(answer.wait().error, ended_by)
    go_on.set()
    other = ask(engine, question(Video(film(20, (64, 48)).file))).wait()  # by the same worker, afterwards
    assert other.error is None
    assert len(frames) < 4, "of 24 that the model takes"


def test_a_video_that_somebody_still_waits_for_is_decoded(
    cached: Engine, video: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ask the same; the one whom it is decoded for goes away."""
    cached.load(MODEL)
    begun, go_on = threading.Event(), threading.Event()
    frames = video_file.video_frames

    def waiting(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return frames(*arguments)

    monkeypatch.setattr(video_file, "video_frames", waiting)
    first = ask(cached, question(video))
    assert begun.wait(30)
    second = ask(cached, question(video))
    (job,) = cached._jobs.values()
    eventually(lambda: len(job._streams) == 2, "the second does not follow the first's job")
    assert first.stream is not None
    first.stream.cancel()
    go_on.set()
    assert isinstance(first.wait().error, Cancelled)
    assert second.wait().error is None
