"""The engine on a real device."""

from __future__ import annotations

import itertools
import subprocess
import sys
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


CLOSED_EARLY = """
import sys
from pathlib import Path
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Message, Request, SamplingParams, Text

settings = {"storage": Path(sys.argv[1]), "device": "cuda", "precision": sys.argv[2], "cache_enabled": False}
engine = Engine(EngineConfig.from_mapping(settings | {"max_batch_size": 8, "gpu_memory": 2048}))
engine.load("demo")
sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
streams = [engine.submit(Request("demo", (Message("user", (Text("what? " * n),)),), sampling)) for n in range(1, 7)]
for stream in streams:
    next(iter(stream))
engine.close()
"""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_may_be_closed_while_steps_are_under_way(storage: Path, precision: str) -> None:
    """In a process of its own: what goes wrong ends the process."""
    ended = subprocess.run(
        [sys.executable, "-c", CLOSED_EARLY, str(storage), precision], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
