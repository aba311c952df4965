"""What the CUDA engine answers: the CPU's tokens, whatever runs beside a request and however it is cut up."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import ContextOverflow
from engine.graphs.cuda.fused import Fusion
from engine.request import Image, Request, Video
from tests.cuda.conftest import StartOnGpu
from tests.cuda.fake_device import FakeGpu, decoder_of, settle
from tests.engine.asking import about, ask, mixed_requests, note_set_backs, picture, replica, request
from tests.engine.conftest import Start
from tests.preprocess.films import film

SIZES = {
    "demo": [(64, 64), (128, 100)],
    "tiny-smolvlm": [(20, 20), (90, 40)],
    "tiny-qwen2-vl": [(56, 56), (84, 140)],
    "tiny-gemma3": [(20, 20), (90, 41)],
}
Result = tuple[str, str, int]  # text, reason, tokens


def greedy(count: int, model: str) -> list[Request]:
    return [
        replace(one, sampling=replace(one.sampling, temperature=0.0, top_p=1.0, seed=None))
        for one in mixed_requests(count, model, sizes=SIZES[model])
    ]


def together(engine: Engine, requests: Iterable[Request]) -> list[Result]:
    answers = [ask(engine, one) for one in requests]
    return [answer.wait().result for answer in answers]


def alone(engine: Engine, requests: Iterable[Request]) -> list[Result]:
    return [ask(engine, one).wait().result for one in requests]


def on_cpu(start: Start, requests: Iterable[Request]) -> list[Result]:
    return together(start(device="cpu", precision="fp32"), requests)


@pytest.mark.parametrize(
    ("model", "count"), [("demo", 8), ("tiny-smolvlm", 16), ("tiny-qwen2-vl", 16), ("tiny-gemma3", 16)]
)
def test_greedy_answers_are_those_of_the_cpu(start: Start, on_gpu: StartOnGpu, model: str, count: int) -> None:
    requests = greedy(count, model)
    assert together(on_gpu(), requests) == on_cpu(start, requests)


def test_answers_about_videos_are_those_of_the_cpu(start: Start, on_gpu: StartOnGpu) -> None:
    """Beside images, and decoding rows of others."""
    options: dict[str, Any] = {"model": "tiny-qwen2-vl", "max_tokens": 20, "ignore_eos": True}
    shown = [Video(film(frames, (90, 64), seed=frames).file) for frames in (12, 31, 40)]
    requests = [about(video, Image(picture(7, (56, 84))), text="what?", **options) for video in shown]
    requests += greedy(4, "tiny-qwen2-vl")
    assert together(on_gpu(), requests) == on_cpu(start, requests)


@pytest.mark.parametrize("model", ["tiny-qwen2-vl", "tiny-gemma3"])
def test_attention_of_plain_operators_answers_alike(start: Start, on_gpu: StartOnGpu, model: str) -> None:
    """What fp32 runs with on a real device."""
    requests = greedy(6, model)
    assert together(on_gpu(FakeGpu(paged=False)), requests) == on_cpu(start, requests)


def test_operators_of_our_own_answer_as_int8_does_on_the_cpu(start: Start, on_gpu: StartOnGpu) -> None:
    requests = greedy(8, "demo")
    fake = FakeGpu(fusion=Fusion(linear=True, attention=True, tower=True))
    found = together(on_gpu(fake, precision="int8"), requests)
    assert found == together(start(device="cpu", precision="int8"), requests)


@pytest.mark.parametrize("model", ["tiny-smolvlm", "tiny-qwen2-vl", "tiny-gemma3"])
def test_requests_together_give_the_tokens_that_each_gives_alone(on_gpu: StartOnGpu, model: str) -> None:
    requests = mixed_requests(10, model, sizes=SIZES[model])
    engine = on_gpu(FakeGpu(blocks=256))
    expected = alone(engine, requests)
    rows = _decode_rows(replica(engine, model).runner)
    assert together(engine, requests) == expected
    assert max(rows) >= 6


@pytest.mark.parametrize("model", ["tiny-smolvlm", "tiny-qwen2-vl"])
def test_steps_that_run_in_parts_give_the_same_tokens(on_gpu: StartOnGpu, model: str) -> None:
    requests = mixed_requests(10, model, sizes=SIZES[model])
    answers, eager = [], []
    for in_parts in (False, True):
        fake = FakeGpu(blocks=256, prefill_tokens=60, in_parts=in_parts)
        answers.append(together(on_gpu(fake), requests))
        eager.append(fake.sessions[0].runs.count(None))
    assert answers[0] == answers[1]
    assert eager[1] < eager[0] / 2, "operator by operator"


def _decode_rows(runner: Any) -> list[int]:
    """From now on, how many sequences decode in each step."""
    rows: list[int] = []
    launch = runner.launch

    def counted(plan: Any) -> Any:
        rows.append(len(plan.decode))
        return launch(plan)

    runner.launch = counted
    return rows


@pytest.mark.parametrize("budget", [3, 33])
def test_the_prefill_budget_of_a_step_changes_nothing(on_gpu: StartOnGpu, budget: int) -> None:
    requests = mixed_requests(4, "tiny-qwen2-vl", sizes=[(56, 56)])
    expected = together(on_gpu(FakeGpu(prefill_tokens=1024)), requests)
    assert together(on_gpu(FakeGpu(prefill_tokens=budget)), requests) == expected


def test_a_step_of_decoding_sequences_replays_a_captured_graph(on_gpu: StartOnGpu) -> None:
    fake = FakeGpu()
    engine = on_gpu(fake)
    model = engine.load("tiny-qwen2-vl")
    captured = set(fake.decoding[0].runs)
    assert None not in captured
    fake.decoding[0].runs.clear()
    _, _, tokens = ask(engine, request("hello", model=model.name, max_tokens=20, ignore_eos=True)).wait().result
    assert len(fake.decoding[0].runs) == tokens - 1
    assert set(fake.decoding[0].runs) < captured


def test_a_short_prompt_replays_a_captured_graph_and_a_longer_one_does_not(on_gpu: StartOnGpu) -> None:
    fake = FakeGpu()
    engine = on_gpu(fake)
    model = engine.load("tiny-qwen2-vl")
    prompts = fake.sessions[0]
    captured = set(prompts.runs)
    prompts.runs.clear()
    alone = [
        ask(engine, request(f"hello {number}", model=model.name, max_tokens=1)).wait().result for number in range(2)
    ]
    assert len(prompts.runs) == 2
    assert set(prompts.runs) < captured
    prompts.runs.clear()
    assert together(engine, [request("hello " * 20, model=model.name, max_tokens=1)])
    assert None in prompts.runs, "a piece as long as the longest graph"
    assert len(alone) == 2


def test_a_batch_of_any_size_fits_its_bucket(on_gpu: StartOnGpu) -> None:
    requests = [
        request("x" * 3 * number, model="tiny-qwen2-vl", max_tokens=6, ignore_eos=True) for number in range(1, 10)
    ]
    engine = on_gpu(max_batch_size=9)
    expected = alone(engine, requests)
    for count in range(2, 10):
        assert together(engine, requests[:count]) == expected[:count]


def test_contexts_around_the_edge_of_a_bucket_change_nothing(start: Start, on_gpu: StartOnGpu) -> None:
    fake = FakeGpu(blocks=128)
    engine = on_gpu(fake)
    prompts = [_prompt_of(engine, tokens) for tokens in (503, 510, 511, 512, 513)]
    requests = [request(prompt, model="tiny-qwen2-vl", max_tokens=12, ignore_eos=True) for prompt in prompts]
    assert {bucket.context for bucket in decoder_of(fake.replicas[0]).buckets} == {512, 1024}
    expected = on_cpu(start, requests)
    assert alone(engine, requests) == expected  # each crosses the edge where it does
    assert together(engine, requests) == expected


def _prompt_of(engine: Engine, tokens: int) -> str:
    """Words that make a prompt of that many tokens, give or take one."""

    def count(words: int) -> int:
        return engine.count_tokens("tiny-qwen2-vl", request("red " * words, model="tiny-qwen2-vl").messages)

    return "red " * bisect.bisect_left(range(1, 1000), tokens, key=count)


def test_a_known_prefix_is_neither_computed_nor_seen_again(on_gpu: StartOnGpu) -> None:
    engine = on_gpu()
    tower = replica(engine, "tiny-qwen2-vl").runner.tower
    encoded: list[int] = []
    encode = tower.encode

    def counted(images: Any) -> Any:
        encoded.append(len(images))
        return encode(images)

    tower.encode = counted
    words = "what shape is in the image? " * 3
    question = request(picture(3, (56, 56)), words, model="tiny-qwen2-vl", max_tokens=24, ignore_eos=True)
    first, second = ask(engine, question).wait(), ask(engine, question).wait()
    other = ask(engine, request(picture(4, (56, 56)), words, model="tiny-qwen2-vl", max_tokens=2)).wait()
    assert first.result == second.result
    assert first.finished is not None
    assert second.finished is not None
    assert other.finished is not None
    usage = second.finished.usage
    assert (first.finished.usage.reused_tokens, usage.reused_tokens) == (0, (usage.prompt_tokens - 1) // 16 * 16)
    assert other.finished.usage.reused_tokens < usage.reused_tokens - 16, "another image is another prefix"
    assert encoded == [1, 1], "the first and the other image"


def test_a_conversation_goes_on_from_the_answer_it_had(on_gpu: StartOnGpu) -> None:
    """Blocks that decoding filled are found too."""
    engine = on_gpu()
    question = request("hello " * 10, model="tiny-smolvlm", max_tokens=40, ignore_eos=True)
    scheduler = replica(engine, "tiny-smolvlm").scheduler
    _ = ask(engine, question).wait().result
    prompt = engine.count_tokens("tiny-smolvlm", question.messages)
    settle(engine, "tiny-smolvlm")
    assert scheduler.kv.indexed_blocks == (prompt + 40 - 1) // 16


def test_sequences_that_are_set_back_say_the_same(on_gpu: StartOnGpu) -> None:
    requests = [
        request(
            picture(seed, (56, 56)),
            "read",
            model="tiny-qwen2-vl",
            max_tokens=70,
            ignore_eos=True,
            seed=seed,
            temperature=seed % 2,
        )
        for seed in range(6)
    ]
    expected = together(on_gpu(), requests)
    tight = on_gpu(FakeGpu(blocks=16))
    scheduler = replica(tight, "tiny-qwen2-vl").scheduler
    outputs = note_set_backs(scheduler)
    assert together(tight, requests) == expected
    assert any(outputs), "no sequence with output was set back"
    settle(tight, "tiny-qwen2-vl")


def test_a_request_that_could_never_fit_is_refused_with_the_numbers(on_gpu: StartOnGpu) -> None:
    engine = on_gpu(FakeGpu(blocks=8))
    with pytest.raises(ContextOverflow, match=r"the prompt is \d{3} tokens; the context holds 128"):
        _ = ask(engine, request("hello " * 200, model="tiny-smolvlm")).wait().text
    longest = ask(engine, request("hello", model="tiny-smolvlm", max_tokens=1000, ignore_eos=True)).wait()
    assert longest.result[1] == "length"
    assert longest.finished is not None
    assert longest.finished.usage.prompt_tokens + longest.finished.usage.completion_tokens == 128


def test_seeded_streams_do_not_depend_on_their_neighbours(on_gpu: StartOnGpu) -> None:
    engine = on_gpu()
    drawn = [
        request("hello", model="tiny-smolvlm", temperature=2.0, seed=seed, max_tokens=12, ignore_eos=True)
        for seed in range(4)
    ]
    expected = alone(engine, drawn)
    assert len(set(expected)) == 4
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        noise = [request("x" * place, model="tiny-smolvlm", temperature=1.0, max_tokens=20) for place in range(1, 5)]
        mixed = [one for place, pick in enumerate(order) for one in (noise[place], drawn[pick])]
        assert together(engine, mixed)[1::2] == [expected[pick] for pick in order]
