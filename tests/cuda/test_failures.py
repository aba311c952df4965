"""What ends on a device, how, and who goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.errors import Cancelled, DeadlineExceeded, DeviceLost, DeviceOutOfMemory, EngineError
from engine.graphs.cuda import StepInputs
from engine.runtime.cuda.failures import DeviceFailures
from tests.cuda.conftest import StartOnGpu
from tests.cuda.fake_device import FakeGpu, settle
from tests.cuda.reference import ReferenceBinding
from tests.engine.asking import ask, picture, replica, request
from tests.host.waiting import eventually

MODEL = "tiny-qwen2-vl"
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB."
# As ONNX Runtime words them.
ARENA_FULL = (
    "Non-zero status code returned while running Gemm node. Failed to allocate memory for requested buffer of size 7"
)
ILLEGAL = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=x ; file=y ; line=1 ; expr=z"

Run = Callable[[Any, int | None], None]


@pytest.fixture
def fake() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def engine(on_gpu: StartOnGpu, fake: FakeGpu) -> Engine:
    engine = on_gpu(fake)
    engine.load(MODEL)
    return engine


def question(number: int = 0, **sampling: Any) -> Any:
    words = "hello " * (number + 1)
    return request(words, model=MODEL, **({"max_tokens": 12, "ignore_eos": True} | sampling))


def failing(fake: FakeGpu, error: Callable[[ReferenceBinding, int | None], Exception | None]) -> None:
    """From now on a run raises what `error` gives for it, if anything."""
    for session in (fake.sessions[0], fake.decoding[0]):
        session.run = partial(_broken, session.run, error)  # type: ignore[method-assign]


def _broken(
    run: Run,
    error: Callable[[ReferenceBinding, int | None], Exception | None],
    binding: Any,
    graph: int | None = None,
) -> None:
    if problem := error(binding, graph):
        raise problem
    run(binding, graph)


def once(problem: Exception) -> Callable[[ReferenceBinding, int | None], Exception | None]:
    problems = iter([problem])
    return lambda binding, graph: next(problems, None)


def sequences(binding: ReferenceBinding) -> int:
    return len(binding.inputs[StepInputs.PAST])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(OUT_OF_MEMORY), DeviceOutOfMemory),
        (torch.AcceleratorError("CUDA error: out of memory"), DeviceOutOfMemory),
        (RuntimeError(ARENA_FULL), DeviceOutOfMemory),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0"), DeviceOutOfMemory),
        (RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0"), DeviceOutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), DeviceLost),
        (RuntimeError(ILLEGAL), DeviceLost),
        (RuntimeError("CUDA failure 719: unspecified launch failure ; GPU=0"), DeviceLost),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), DeviceLost),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), DeviceLost),
        (ValueError("a shape"), ValueError),
        (torch.AcceleratorError("CUDA error: invalid argument"), torch.AcceleratorError),
        (Cancelled("out of memory"), Cancelled),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_the_libraries_raise_has_a_meaning(error: BaseException, expected: type[BaseException]) -> None:
    with pytest.raises(BaseException) as raised, DeviceFailures(torch.device("cpu")):  # noqa: PT011
        raise error
    assert type(raised.value) is expected
    assert raised.value is error or raised.value.__cause__ is error


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError(OUT_OF_MEMORY), RuntimeError(ARENA_FULL)])
def test_a_step_that_does_not_fit_is_cut_down_and_everybody_finishes(
    engine: Engine, fake: FakeGpu, problem: Exception
) -> None:
    questions = [question(number) for number in range(7)]
    expected = [ask(engine, one).wait().result for one in questions]
    outputs = _count_set_back(engine)
    failing(fake, lambda binding, graph: problem if sequences(binding) > 2 else None)
    answers = [ask(engine, one) for one in questions]
    assert [answer.wait().result for answer in answers] == expected
    assert outputs
    settle(engine, MODEL)


def _count_set_back(engine: Engine) -> list[int]:
    outputs: list[int] = []
    scheduler = replica(engine, MODEL).scheduler
    set_back = scheduler._set_back

    def counted(sequence: Any) -> None:
        outputs.append(len(sequence.output))
        set_back(sequence)

    scheduler._set_back = counted
    return outputs


def test_a_request_that_does_not_fit_alone_fails_and_the_next_one_works(engine: Engine, fake: FakeGpu) -> None:
    problem = torch.OutOfMemoryError(OUT_OF_MEMORY)
    failing(fake, lambda binding, graph: problem if graph is None else None)  # what is longer than captured pieces
    with pytest.raises(DeviceOutOfMemory, match="ran out of memory; ask for less"):
        _ = ask(engine, question(60)).wait().text
    assert ask(engine, question()).wait().text
    settle(engine, MODEL)


def test_images_that_do_not_fit_together_are_encoded_one_by_one(engine: Engine) -> None:
    tower = replica(engine, MODEL).runner.tower
    encode, calls = tower.encode, []

    def small(images: Any) -> Any:
        calls.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return encode(images)

    several = request(picture(1, (56, 56)), picture(2, (56, 56)), "which?", model=MODEL, max_tokens=5)
    expected = ask(engine, several).wait().result
    tower.encode = small
    other = request(picture(2, (56, 56)), picture(1, (56, 56)), "which?", model=MODEL, max_tokens=5)
    assert ask(engine, other).wait().text
    assert calls == [2, 1, 1]
    assert ask(engine, several).wait().result == expected


@pytest.mark.parametrize("graph_runs", [False, True])
def test_a_step_that_fails_ends_its_requests_and_the_next_one_works(
    engine: Engine, fake: FakeGpu, graph_runs: bool
) -> None:
    expected = ask(engine, question(40)).wait().result
    problems = iter([RuntimeError("a broken kernel")])
    failing(fake, lambda binding, graph: next(problems, None) if (graph is not None) == graph_runs else None)
    with pytest.raises(EngineError, match="running the model failed: a broken kernel"):
        _ = ask(engine, question(60)).wait().text  # longer than captured pieces, and than what is known
    assert ask(engine, question(40)).wait().result == expected
    settle(engine, MODEL)


def test_tokens_that_cannot_be_read_end_their_requests_and_are_never_reused(engine: Engine) -> None:
    runner = replica(engine, MODEL).runner
    launch = runner.launch

    class Broken:
        def __init__(self, result: Any) -> None:
            self.sequences = result.sequences

        def tokens(self) -> list[int]:
            raise RuntimeError("a broken copy")

    def broken(plan: Any) -> Any:
        runner.launch = launch
        return Broken(launch(plan))

    runner.launch = broken
    with pytest.raises(EngineError, match="running the model failed: a broken copy"):
        _ = ask(engine, question(20)).wait().text
    again = ask(engine, question(20)).wait()
    assert again.result[2] == 12
    assert again.finished is not None
    assert again.finished.usage.reused_tokens == 0
    settle(engine, MODEL)


def test_logits_that_are_no_numbers_fail_one_request_only(engine: Engine) -> None:
    expected = ask(engine, question(30)).wait().result
    decoder, scheduler = replica(engine, MODEL).runner.decoder, replica(engine, MODEL).scheduler
    run = decoder.run
    damaged: list[int] = []

    def broken(step: Any) -> Any:
        logits, slots = run(step)
        victims = [one.row for one in scheduler.running if one.max_tokens == 300 and one.row in slots]
        if victims and not damaged and (len(slots) == 2 or len(scheduler.running) == 1):
            damaged.extend(victims)
            logits = logits.clone()
            logits[slots.tolist().index(victims[0]), 7] = torch.nan
        return logits, slots

    decoder.run = broken
    first, second = ask(engine, question(30)), ask(engine, question(5, max_tokens=300))
    assert first.wait().result == expected
    with pytest.raises(EngineError, match="not a number"):
        _ = second.wait().text
    assert damaged
    settle(engine, MODEL)


def test_what_is_no_number_is_not_found_again(engine: Engine) -> None:
    decoder = replica(engine, MODEL).runner.decoder
    run = decoder.run

    def broken(step: Any) -> Any:
        logits, slots = run(step)
        if not len(slots):
            return logits, slots
        decoder.run = run
        return torch.full_like(logits, torch.nan), slots

    decoder.run = broken
    with pytest.raises(EngineError, match="not a number"):
        _ = ask(engine, question(30)).wait().text
    again = ask(engine, question(30)).wait()
    assert again.finished is not None
    assert again.finished.usage.reused_tokens == 0


def test_a_lost_device_fails_everything_that_is_open_at_once(engine: Engine, fake: FakeGpu) -> None:
    answers = [ask(engine, question(number, max_tokens=500)) for number in range(3)]
    eventually(lambda: all(answer.chunks for answer in answers), "no text came")
    failing(fake, lambda binding, graph: RuntimeError(ILLEGAL))
    for answer in answers:
        with pytest.raises(DeviceLost, match="illegal memory access"):
            _ = answer.wait().text
    with pytest.raises(DeviceLost):
        _ = ask(engine, question()).wait().text
    settle(engine, MODEL)


def test_a_tower_that_loses_the_device_fails_everything_too(engine: Engine) -> None:
    answer = ask(engine, question(max_tokens=500))
    eventually(lambda: bool(answer.chunks), "no text came")

    def broken(images: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    replica(engine, MODEL).runner.tower.encode = broken
    with pytest.raises(DeviceLost):
        _ = ask(engine, request(picture(9, (56, 56)), "what?", model=MODEL)).wait().text
    with pytest.raises(DeviceLost):
        _ = answer.wait().text


def test_a_cancelled_request_gives_its_blocks_back_and_its_neighbour_goes_on(engine: Engine) -> None:
    expected = ask(engine, question(3, max_tokens=60)).wait().result
    leaving, staying = ask(engine, question(4, max_tokens=900)), ask(engine, question(3, max_tokens=60))
    eventually(lambda: bool(leaving.chunks), "no text came")
    assert leaving.stream is not None
    leaving.stream.cancel()
    assert isinstance(leaving.wait().error, Cancelled)
    assert staying.wait().result == expected
    settle(engine, MODEL)


def test_a_request_ends_at_its_deadline(engine: Engine, fake: FakeGpu) -> None:
    def slow(binding: Any, graph: int | None) -> None:
        time.sleep(0.02)

    failing(fake, slow)
    late = request("hello", model=MODEL, max_tokens=900, ignore_eos=True, timeout_s=0.3)
    with pytest.raises(DeadlineExceeded):
        _ = ask(engine, late).wait().text
    settle(engine, MODEL)


def test_a_stop_word_ends_an_answer_and_the_step_under_way_changes_nothing(on_gpu: StartOnGpu) -> None:
    engine = on_gpu()
    whole = ask(engine, request("hello")).wait().text
    word = whole[3:6]
    stopped = [ask(engine, request("hello", stop=(word,))) for _ in range(3)]
    longer = ask(engine, request("hello"))
    for answer in stopped:
        text, reason, tokens = answer.wait().result
        assert (text, reason) == (whole[: whole.index(word)], "stop")
        assert tokens == whole.index(word) + len(word)
    assert longer.wait().text == whole
    settle(engine, "demo")
    assert ask(engine, request("hello")).wait().text == whole


def test_every_token_is_counted_once(engine: Engine) -> None:
    answers = [ask(engine, question(number, max_tokens=5 + number)) for number in range(8)]
    for number, answer in enumerate(answers):
        assert answer.wait().result[1:] == ("length", 5 + number)
        assert answer.tokens <= 5 + number
    settle(engine, MODEL)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_one_token_is_an_answer(engine: Engine, fake: FakeGpu, ignore_eos: bool) -> None:
    fake.sessions[0].runs.clear()
    fake.decoding[0].runs.clear()
    assert ask(engine, question(max_tokens=1, ignore_eos=ignore_eos)).wait().result[2] == 1
    settle(engine, MODEL)
    assert (len(fake.sessions[0].runs), len(fake.decoding[0].runs)) == (1, 0)


@pytest.fixture
def eos_first(engine: Engine) -> Iterator[None]:
    """The first row ever sampled gets the end token."""
    runner = replica(engine, MODEL).runner
    eos, sample = engine.load(MODEL).artifact.spec.tokens.eos[0], runner._sampler.sample

    def ends(logits: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        runner._sampler.sample = sample
        tokens: torch.Tensor = sample(logits, slots)
        tokens[0] = eos
        runner._sampler.slot_tokens[slots[0]] = eos
        return tokens

    runner._sampler.sample = ends
    yield
    runner._sampler.sample = sample


@pytest.mark.usefixtures("eos_first")
def test_an_answer_may_end_before_it_begins(engine: Engine) -> None:
    answer = ask(engine, question(ignore_eos=False)).wait()
    assert answer.result == ("", "stop", 1)
    settle(engine, MODEL)
    assert ask(engine, question(ignore_eos=False)).wait().text
