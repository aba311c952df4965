"""The CPU's runner among its threads."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engine.prompts import Prompt
from engine.request import SamplingParams
from engine.runners.cpu import CpuRunner
from engine.runtime import Decoder, Encoder
from engine.sampling import SamplerState
from engine.scheduling.scheduler import PrefillChunk, StepPlan
from engine.scheduling.sequence import Sequence
from engine.spec import ModelSpec

WAIT_S = 10.0
SPEC = SimpleNamespace(
    decoder=SimpleNamespace(delta_net=None, vocab=8, feature_width=4), tokens=SimpleNamespace(eos=())
)


class BlockingTower:
    """Says when it has begun, and is done when it is told."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def encode(self, images: list[Any]) -> list[Any]:
        self.begun.set()
        assert self.may_end.wait(WAIT_S)
        return images


class EchoDecoder:
    """A prompt is followed by its row's number."""

    rows = 4

    def announce(self, row: int, stop: int) -> None: ...

    def prefill(self, row: int, *_: Any, logits: bool) -> NDArray[np.float32]:
        return np.eye(8, dtype=np.float32)[[row] if logits else []]


def prompt(number: int) -> PrefillChunk:
    tokens = np.arange(3)
    text = Prompt(tokens, np.full(3, -1), tokens[None], position_delta=0, image_spans=(), image_tokens=0)
    sampler = SamplerState(SamplingParams(temperature=0.0), tokens)
    sequence = Sequence(number, text, (), [], sampler, max_tokens=4, row=number, prefill_end=3)
    return PrefillChunk(sequence, 0, 3, gives_token=True)


def test_a_step_does_not_wait_for_images_that_have_its_helper() -> None:
    tower = BlockingTower()
    runner = CpuRunner(
        cast(ModelSpec, SPEC),
        cast(Decoder, EchoDecoder()),
        cast(Encoder, tower),
        helpers=1,
        weight_bytes=0,
        kv_bytes=0,
    )
    features = runner.encode([])
    assert tower.begun.wait(WAIT_S)
    step = runner.launch(StepPlan(prefill=[prompt(number) for number in range(3)]))
    assert step.tokens() == [0, 1, 2]
    assert not features.done()
    tower.may_end.set()
    assert features.result() == []
    runner.close()
