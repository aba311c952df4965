"""Loading, unloading, several devices, and what is kept on disk."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.engine import Engine
from engine.errors import DeviceOutOfMemory
from tests.cuda.conftest import StartOnGpu
from tests.cuda.fake_device import FakeGpu, decoder_of, settle
from tests.engine.asking import ask, mixed_requests, picture, replica, request
from tests.host.waiting import eventually

MODEL = "tiny-qwen2-vl"


def arrivals(fake: FakeGpu) -> list[int]:
    """From now on, the device of each sequence in the order in which they arrive."""
    devices: list[int] = []
    for number, one in enumerate(fake.replicas):
        scheduler: Any = one.scheduler
        scheduler.add = _noting(scheduler.add, devices, number)
    return devices


def _noting(add: Any, devices: list[int], number: int) -> Any:
    def noted(sequence: Any) -> None:
        devices.append(number)
        add(sequence)

    return noted


def test_two_devices_behind_one_queue_both_work_and_answer_alike(on_gpu: StartOnGpu) -> None:
    requests = mixed_requests(10, MODEL, sizes=[(56, 56)])
    one = on_gpu()
    expected = [ask(one, question).wait().result for question in requests]
    fake = FakeGpu(count=2)
    engine = on_gpu(fake)
    engine.load(MODEL)
    devices = arrivals(fake)
    answers = [ask(engine, question) for question in requests]
    assert [answer.wait().result for answer in answers] == expected
    assert 3 <= devices.count(0) <= 7
    assert [status["device"] for status in engine.status()["models"][MODEL]["replicas"]] == ["cuda:0", "cuda:1"]
    settle(engine, MODEL)
    assert [one.load for one in fake.replicas] == [0, 0]


def test_the_device_with_the_least_to_do_gets_the_next_request(on_gpu: StartOnGpu) -> None:
    fake = FakeGpu(count=2)
    engine = on_gpu(fake)
    engine.load(MODEL)
    devices = arrivals(fake)
    long = ask(engine, request("hello", model=MODEL, max_tokens=900, ignore_eos=True))
    eventually(lambda: bool(long.chunks), "no text came")
    for _ in range(3):
        _ = ask(engine, request("hello", model=MODEL, max_tokens=2)).wait().result
        eventually(lambda: fake.replicas[1].load == 0, "the load was not taken off")
    assert long.stream is not None
    long.stream.cancel()
    assert devices == [0, 1, 1, 1]


def test_a_model_that_does_not_fit_one_device_is_given_up_on_the_others(on_gpu: StartOnGpu) -> None:
    class Uneven(FakeGpu):
        def open(self, *arguments: Any) -> Any:
            if arguments[-1] == 1 and len(self.replicas) == 1:
                raise DeviceOutOfMemory("tiny does not fit cuda:1")
            return super().open(*arguments)

    fake = Uneven(count=2)
    engine = on_gpu(fake)
    with pytest.raises(DeviceOutOfMemory, match="does not fit cuda:1"):
        _ = ask(engine, request("hello", model=MODEL)).wait().text
    decoder = decoder_of(fake.replicas[0])
    eventually(lambda: not decoder.kv_bytes, "the device that it does fit keeps its memory")
    assert ask(engine, request("hello", model=MODEL, max_tokens=2)).wait().error is None


def test_an_idle_model_gives_its_memory_back_and_the_next_request_loads_it_again(on_gpu: StartOnGpu) -> None:
    fake = FakeGpu()
    engine = on_gpu(fake, idle_unload_minutes=0.004)
    question = request(picture(1, (56, 56)), "hello", model=MODEL, max_tokens=6)
    expected = ask(engine, question).wait().result
    decoder = decoder_of(fake.replicas[0])
    cache = weakref.ref(next(iter(decoder._caches.values())))
    eventually(lambda: not engine.status()["models"], "the model was not unloaded")
    eventually(lambda: not decoder.kv_bytes, "the memory was not given back")
    gc.collect()
    assert cache() is None
    assert ask(engine, question).wait().result == expected
    assert len(fake.replicas) == 2


def test_a_model_in_use_is_not_idle(on_gpu: StartOnGpu) -> None:
    fake = FakeGpu()
    engine = on_gpu(fake, idle_unload_minutes=0.001)
    answers = [ask(engine, request("hello", model=MODEL, max_tokens=120, ignore_eos=True)) for _ in range(2)]
    assert all(answer.wait().result[2] == 120 for answer in answers)
    assert len(fake.replicas) == 1


@pytest.fixture
def cached(storage: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "models").symlink_to(storage / "models")
    return {"storage": tmp_path, "cache_enabled": True}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_features_on_disk_are_those_of_the_device(on_gpu: StartOnGpu, cached: dict[str, Any], precision: str) -> None:
    def question(words: str) -> Any:
        return request(picture(1, (56, 56)), words, picture(2, (84, 56)), model=MODEL, max_tokens=8, ignore_eos=True)

    first = on_gpu(precision=precision, **cached)
    expected = ask(first, question("which?")).wait().result
    _ = ask(first, question("what?")).wait().result
    first.close()
    second = on_gpu(precision=precision, **cached)
    calls = _tower_calls(second)
    other = ask(second, question("and then?")).wait()  # not an answer that is known
    assert other.finished is not None
    assert not other.finished.from_cache
    assert not calls
    fresh = on_gpu(precision=precision)
    assert ask(fresh, question("and then?")).wait().result == other.result
    assert ask(fresh, question("which?")).wait().result == expected


def _tower_calls(engine: Engine) -> list[int]:
    tower = replica(engine, MODEL).runner.tower
    encode, calls = tower.encode, []

    def counted(images: Any) -> Any:
        calls.append(len(images))
        return encode(images)

    tower.encode = counted
    return calls


def test_features_that_cannot_be_copied_are_not_kept_and_the_answer_comes(
    on_gpu: StartOnGpu, cached: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = on_gpu(**cached)
    runner = replica(engine, MODEL).runner

    def full(features: Any) -> Any:
        raise DeviceOutOfMemory("no memory for a copy")

    runner.host_features = full
    assert ask(engine, request(picture(5, (56, 56)), "what?", model=MODEL, max_tokens=3)).wait().text is not None
    assert "are not kept" in caplog.text


def test_a_tokens_numbers_are_the_hosts(on_gpu: StartOnGpu) -> None:
    """What the steps' records count, a step after it was launched, adds up."""
    records: list[Any] = []
    engine = on_gpu()
    engine._on_step = records.append
    answers = [ask(engine, request("x" * n, model=MODEL, max_tokens=9, ignore_eos=True)) for n in (1, 30, 90)]
    usages = [answer.wait().finished.usage for answer in answers]  # type: ignore[union-attr]
    settle(engine, MODEL)
    assert sum(record.tokens_out for record in records) == 27
    prompts = sum(usage.prompt_tokens - usage.reused_tokens for usage in usages)
    assert sum(record.prefill_tokens for record in records) == prompts
    assert sum(record.decode_rows for record in records) == 3 * 8
    assert all(np.isfinite(record.host_s) and record.finished_s >= record.started_s for record in records)
