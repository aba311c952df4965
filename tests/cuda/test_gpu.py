"""The engine on a real device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Image, Message, Request, SamplingParams, Text
from evaluation import easy_vqa
from evaluation.samples import Sample
from tests.engine.asking import Answer, ask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
QUESTIONS = 2000


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path


def answers(
    storage: Path, device: str, precision: str, samples: list[Sample], fusion: str = "off"
) -> Iterator[tuple[str, int]]:
    """Text and number of tokens of each greedy answer."""
    settings = {"storage": storage, "device": device, "precision": precision, "cache_enabled": False}
    settings |= {"kernel_fusion": fusion}
    engine = Engine(EngineConfig.from_mapping(settings | {"max_waiting": QUESTIONS, "max_batch_size": 64}))
    try:
        waiting = [ask(engine, _request(sample)) for sample in samples]
        for answer in waiting:
            yield _outcome(answer)
    finally:
        engine.close()


def _request(sample: Sample) -> Request:
    message = Message("user", (Image(sample.image), Text(sample.question)))
    return Request("demo", (message,), SamplingParams(temperature=0.0, max_tokens=24))


def _outcome(answer: Answer) -> tuple[str, int]:
    text = answer.wait().text
    assert answer.finished is not None
    return text, answer.finished.usage.completion_tokens


@pytest.mark.parametrize(
    ("precision", "fusion"), [("fp16", "off"), ("bf16", "off"), ("fp16", "on"), ("bf16", "on"), ("int8", "on")]
)
def test_greedy_tokens_are_those_of_the_cpu(storage: Path, precision: str, fusion: str) -> None:
    """int8 against int8: what rounding the weights changes, it changes on both."""
    samples = list(itertools.islice(easy_vqa.test_samples(), QUESTIONS))
    on_cpu = list(answers(storage, "cpu", "int8" if precision == "int8" else "fp32", samples))
    on_gpu = list(answers(storage, "cuda", precision, samples, fusion))
    same = sum(one == other for one, other in zip(on_cpu, on_gpu, strict=True))
    print(f"{precision}, fusion {fusion}: {same} of {len(samples)} answers are the CPU's")
    assert same >= 0.99 * len(samples)
