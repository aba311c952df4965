"""Sequences with a state of linear attention on a device: batched, captured, set back, reused, and after a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import engine.scheduling.paged
from engine.request import Request
from tests.cuda.conftest import StartOnGpu
from tests.cuda.fake_device import FakeGpu, decoder_of, settle
from tests.cuda.paged import Paged, Part
from tests.cuda.test_engine_on_cuda import alone, on_cpu, together
from tests.engine.asking import ask, mixed_requests, note_set_backs, picture, replica, request
from tests.engine.conftest import Start
from tests.engine.test_linear_attention import MODEL, SIZES, with_model
from tests.runtime.cases import relative_error
from tests.runtime.conftest import make_tiny


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_model(tmp_path_factory.mktemp("storage"))


def asked(count: int) -> list[Request]:
    return mixed_requests(count, MODEL, sizes=SIZES)


def test_answers_are_those_of_the_cpu(start: Start, on_gpu: StartOnGpu) -> None:
    requests = [request(picture(seed, (64, 64)), "read " * seed, model=MODEL, max_tokens=24) for seed in range(10)]
    assert together(on_gpu(), requests) == on_cpu(start, requests)


def test_attention_of_plain_operators_answers_alike(start: Start, on_gpu: StartOnGpu) -> None:
    requests = [request(picture(seed, (64, 64)), "read " * seed, model=MODEL, max_tokens=8) for seed in range(6)]
    assert together(on_gpu(FakeGpu(paged=False)), requests) == on_cpu(start, requests)


def test_requests_together_give_the_tokens_that_each_gives_alone(on_gpu: StartOnGpu) -> None:
    engine = on_gpu(FakeGpu(blocks=256))
    expected = alone(engine, asked(7))
    assert together(engine, asked(7)) == expected
    for count in (3, 5):  # batches that their buckets are larger than
        assert together(engine, asked(count)) == expected[:count]


@pytest.mark.parametrize("budget", [3, 33])
def test_the_prefill_budget_of_a_step_changes_nothing(on_gpu: StartOnGpu, budget: int) -> None:
    expected = together(on_gpu(FakeGpu(prefill_tokens=1024)), asked(4))
    assert together(on_gpu(FakeGpu(prefill_tokens=budget)), asked(4)) == expected


def test_steps_of_decoding_sequences_replay_captured_graphs(on_gpu: StartOnGpu) -> None:
    fake = FakeGpu()
    engine = on_gpu(fake)
    engine.load(MODEL)
    prompts, decoding = fake.sessions[0], fake.decoding[0]
    captured = set(decoding.runs)
    requests = [request("hi " * seed, model=MODEL, max_tokens=12, ignore_eos=True) for seed in range(1, 6)]
    together(engine, requests)
    assert set(decoding.runs) == captured
    assert len(prompts.runs) <= len(requests) + 1, "only prompts run operator by operator"


def test_sequences_that_are_set_back_say_the_same(on_gpu: StartOnGpu) -> None:
    requests = [
        request(picture(seed), "read", model=MODEL, max_tokens=70, ignore_eos=True, seed=seed, temperature=seed % 2)
        for seed in range(6)
    ]
    expected = together(on_gpu(), requests)
    tight = on_gpu(FakeGpu(blocks=16))
    set_back = note_set_backs(replica(tight, MODEL).scheduler)
    assert together(tight, requests) == expected
    assert any(set_back), "no sequence with output was set back"
    settle(tight, MODEL)


def test_a_prefix_that_two_had_is_the_thirds_with_its_state(
    on_gpu: StartOnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.scheduling.paged, "_WORTH_A_STATE", 16)
    running = on_gpu(FakeGpu(prefill_tokens=1024))
    words = "what shape is in the image? " * 8
    question = request(picture(3), words, model=MODEL, max_tokens=24, ignore_eos=True)
    answers = [ask(running, question).wait() for _ in range(4)]
    assert len({answer.result for answer in answers}) == 1
    reused = [answer.finished.usage.reused_tokens for answer in answers if answer.finished]
    assert reused[:2] == [0, 0]
    assert answers[0].finished is not None
    assert reused[2] == reused[3] == (answers[0].finished.usage.prompt_tokens - 1) // 16 * 16
    other = ask(running, request(picture(4), words, model=MODEL, max_tokens=24, ignore_eos=True)).wait()
    assert other.finished is not None
    assert other.finished.usage.reused_tokens == 0, "another image is another prefix"


def test_a_prompt_of_several_chunks_leaves_a_state_at_its_last_whole_one(on_gpu: StartOnGpu) -> None:
    running = on_gpu(FakeGpu(prefill_tokens=32))
    question = request("some words " * 12, model=MODEL, max_tokens=24, ignore_eos=True)
    first, second = (ask(running, question).wait() for _ in range(2))
    assert first.result == second.result
    assert second.finished is not None
    usage = second.finished.usage
    assert usage.reused_tokens == (usage.prompt_tokens - 1) // 32 * 32 > 32


def test_more_prefixes_than_places_for_states_change_nothing(on_gpu: StartOnGpu) -> None:
    expected = together(on_gpu(FakeGpu(prefill_tokens=32, copies=0)), asked(5))
    running = on_gpu(FakeGpu(prefill_tokens=32, copies=2))
    for _ in range(3):
        assert together(running, asked(5)) == expected


def test_a_step_that_dies_of_memory_half_way_leaves_no_wrong_state(
    on_gpu: StartOnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request("read " * seed, model=MODEL, max_tokens=40, ignore_eos=True) for seed in range(1, 7)]
    expected = together(on_gpu(), requests)
    running = on_gpu()
    decoder: Any = replica(running, MODEL).runner.decoder
    run, steps, failed = decoder.run, [0], [0]

    def failing(step: Any) -> Any:
        steps[0] += 1
        result = run(step)  # the states have been written
        if steps[0] % 17 == 0 and len(step.counts) > 1:
            failed[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(decoder, "run", failing)
    assert together(running, requests) == expected
    assert failed[0] >= 2
    settle(running, MODEL)


def test_a_sequence_that_ended_was_in_one_step_too_many_and_harms_nobody(on_gpu: StartOnGpu) -> None:
    """Sequences come and go at every step, so that rows change hands while a step is under way."""
    requests = [
        request("go " * (1 + seed % 5), model=MODEL, max_tokens=1 + seed % 7, temperature=1.0, seed=seed)
        for seed in range(25)
    ]
    expected = alone(on_gpu(), requests)
    running = on_gpu(max_batch_size=5)
    assert together(running, requests) == expected
    states = decoder_of(replica(running, MODEL)).states
    settle(running, MODEL)
    assert states is not None
    assert not any(map(states.holds, range(5)))


def test_a_batch_is_not_filled_up_with_rows_of_somebody_who_waits(tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny = make_tiny("qwen3_5_text", tmp_path_factory)
    paged, case = Paged(tiny, "fp16", "float16"), tiny.text_case(40, 3)
    paged.step(*(Part(slot, case, 0, 10 + slot) for slot in range(4)))
    steps = [[0, 1, 2], [3, 0, 1], [0, 1, 2, 3], [2], [3, 1, 0]]  # a batch of three is computed as one of four
    places = [10, 11, 12, 13]
    for slots in steps:
        found = paged.step(*(Part(slot, case, places[slot], places[slot] + 1) for slot in slots))
        assert relative_error(found, case.logits[[places[slot] for slot in slots]]) < 0.03
        for slot in slots:
            places[slot] += 1
