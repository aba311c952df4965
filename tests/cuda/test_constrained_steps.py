"""Constrained output on a device, where a step is launched before the tokens of the last are read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from engine import loop
from engine.request import Request
from engine.runners import cuda
from engine.runtime.cuda.decoder import PagedDecoder
from engine.sampling import masks
from engine.sampling.device import DeviceSampler
from engine.sampling.grammar import Matcher, Words
from engine.stats import StepRecord
from tests.cuda.conftest import StartOnGpu
from tests.cuda.fake_device import FakeGpu
from tests.engine.asking import Answer, ask, picture, replica, request
from tests.engine.conftest import Start
from tests.engine.schemas import random_schema


def asked(count: int, *, greedy: bool = False) -> list[tuple[Request, Any]]:
    """Every third is free text."""
    found = []
    for seed in range(count):
        schema = random_schema(seed) if seed % 3 else None
        drawn = {} if greedy or seed % 2 else {"temperature": 1.0, "seed": seed}
        text = None if schema is None else json.dumps(schema)
        limit = 500 if schema else 30
        one = request(f"form {seed}", model="tiny-qwen2-vl", json_schema=text, max_tokens=limit, **drawn)
        found.append((one, schema))
    return found


def fits(answer: Answer, schema: Any) -> None:
    assert answer.finished is not None, answer.error
    if schema is not None:
        assert answer.finished.reason == "stop", answer.text
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))


def test_constrained_and_free_requests_share_steps(on_gpu: StartOnGpu) -> None:
    engine = on_gpu(FakeGpu(blocks=256))
    cases = asked(12)
    for answer, (_, schema) in zip([ask(engine, one) for one, _ in cases], cases, strict=True):
        fits(answer.wait(), schema)


def test_greedy_answers_are_those_of_the_cpu(start: Start, on_gpu: StartOnGpu) -> None:
    requests = [one for one, _ in asked(9, greedy=True)] + [
        request(picture(1), "what?", model="tiny-qwen2-vl", json_object=True, max_tokens=40)
    ]
    expected = [ask(start(device="cpu", precision="fp32"), one) for one in requests]
    found = [ask(on_gpu(), one) for one in requests]
    assert [one.wait().result for one in found] == [one.wait().result for one in expected]


def test_constrained_sequences_that_are_set_back_go_on_where_they_were(on_gpu: StartOnGpu) -> None:
    engine = on_gpu(FakeGpu(blocks=24))
    scheduler: Any = replica(engine, "tiny-qwen2-vl").scheduler
    set_back, outputs = scheduler._set_back, []

    def counted(sequence: Any) -> None:
        if sequence.sampler.grammar is not None:
            outputs.append(len(sequence.output) + sequence.pending)
        set_back(sequence)

    scheduler._set_back = counted
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 12, "maxItems": 14}
    drawn: dict[str, Any] = {"json_schema": json.dumps(schema), "max_tokens": 300, "temperature": 1.0}
    requests = [request("list", model="tiny-qwen2-vl", seed=seed, **drawn) for seed in range(8)]
    for answer in [ask(engine, one) for one in requests]:
        fits(answer.wait(), schema)
    assert any(outputs), "no constrained sequence with output was set back"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_output_that_cannot_go_on_says_so_and_its_neighbours_do(
    on_gpu: StartOnGpu, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    engine = on_gpu(FakeGpu(blocks=256), device=device)
    refine = Matcher.refine

    def stuck(matcher: Matcher, words: Words) -> None:
        refine(matcher, words)
        if b"stuck" in spelt.get(matcher, b""):
            words.fill(0)

    def commit(matcher: Matcher, token: int) -> None:
        spelt[matcher] = spelt.get(matcher, b"") + matcher.vocabulary.token_bytes(token)
        committed(matcher, token)

    spelt: dict[Matcher, bytes] = {}
    committed = Matcher.commit
    monkeypatch.setattr(Matcher, "refine", stuck)
    monkeypatch.setattr(Matcher, "commit", commit)
    answers = [
        ask(engine, request("list", model="tiny-qwen2-vl", json_schema=json.dumps({"const": text}), max_tokens=50))
        for text in ("here it is stuck, for good", "and here it is not, so far")
    ]
    error = answers[0].wait().error
    assert error is not None
    assert "no token of the model's vocabulary can go on with the JSON" in str(error)
    assert answers[1].wait().text == '"and here it is not, so far"'


def test_a_step_is_enqueued_before_the_last_ones_tokens_are_awaited_for_its_masks(
    on_gpu: StartOnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def noted[**P, T](name: str, function: Callable[P, T]) -> Callable[P, T]:
        def call(*arguments: P.args, **named: P.kwargs) -> T:
            happened.append(name)
            return function(*arguments, **named)

        return call

    engine = on_gpu(FakeGpu(blocks=256))
    engine.load("tiny-qwen2-vl")
    monkeypatch.setattr(PagedDecoder, "run", noted("forward", PagedDecoder.run))
    monkeypatch.setattr(PagedDecoder, "_decode", noted("decode", PagedDecoder._decode))
    monkeypatch.setattr(PagedDecoder, "go_on", noted("go on", PagedDecoder.go_on))
    monkeypatch.setattr(cuda._TokenCopy, "wait", noted("wait", cuda._TokenCopy.wait))
    monkeypatch.setattr(cuda, "masks", noted("masks", masks))
    monkeypatch.setattr(DeviceSampler, "constrain", noted("constrain", DeviceSampler.constrain))
    monkeypatch.setattr(DeviceSampler, "sample", noted("sample", DeviceSampler.sample))
    schema = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 5, "maxItems": 6}
    one = request("list", model="tiny-qwen2-vl", json_schema=json.dumps(schema), max_tokens=300)
    fits(ask(engine, one).wait(), schema)
    steps = [step.split() for step in " ".join(happened).replace("go on", "again").split("sample")]
    repeated = [step for step in steps if step[:1] == ["again"] and "forward" not in step]
    assert len(repeated) > 5, steps
    assert all(step == ["again", "wait", "masks", "constrain"] for step in repeated), steps


def test_waiting_for_tokens_that_masks_need_is_no_work_of_the_host(
    on_gpu: StartOnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def wait(copy: Any) -> list[int]:
        nonlocal now
        now += 1.0
        return original(copy)

    original, clock = cuda._TokenCopy.wait, SimpleNamespace(perf_counter=lambda: now, monotonic=time.monotonic)
    records: list[StepRecord] = []
    engine = on_gpu(FakeGpu(blocks=256))
    replica(engine, "tiny-qwen2-vl")
    monkeypatch.setattr(cuda._TokenCopy, "wait", wait)
    monkeypatch.setattr(cuda, "time", clock)
    monkeypatch.setattr(loop, "time", clock)
    [device_loop] = [one for _, one in engine.load("tiny-qwen2-vl").replicas]
    device_loop._on_step = records.append
    schema = {"enum": ["red and green"]}
    fits(ask(engine, request("c", model="tiny-qwen2-vl", json_schema=json.dumps(schema), max_tokens=50)).wait(), schema)
    assert records[-1].finished_s > 5.0
    assert {record.host_s for record in records} == {0.0}
