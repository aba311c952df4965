"""How a replica on a device is put together, with sessions in torch and a device's memory that is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.runners.open_cuda as module
from engine.checkpoints import Artifact
from engine.config import EngineConfig
from engine.errors import DeviceOutOfMemory
from engine.graphs.cuda import CudaGraph
from engine.replica import Replica
from engine.request import Request
from tests.cuda.conftest import StartOnGpu
from tests.cuda.fake_device import CPU, FakeGpu, settle
from tests.cuda.reference import ReferenceSession
from tests.cuda.test_engine_on_cuda import on_cpu, together
from tests.engine.asking import mixed_requests, replica
from tests.engine.conftest import Start
from tests.engine.test_linear_attention import MODEL as LINEAR
from tests.engine.test_linear_attention import with_model

MIB = 2**20
TAKEN = 64 * MIB  # by all that is opened


@pytest.fixture(scope="module", autouse=True)
def linear_model(storage: Path) -> None:
    with_model(storage)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opens what a GPU's sessions would, on the CPU; its memory is TAKEN once it was looked at."""

    def session(graph: CudaGraph, weights: dict[str, torch.Tensor], *_: Any, **__: Any) -> ReferenceSession:
        return ReferenceSession(graph.model, weights)

    free = _free()
    for room in ("runners.sessions", "runtime.cuda.encoder"):
        monkeypatch.setattr(f"engine.{room}.CudaSession", session)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 1 << 34))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)


def _free() -> Iterator[int]:
    yield 1 << 33
    while True:
        yield (1 << 33) - TAKEN


def opened(
    on_gpu: StartOnGpu, monkeypatch: pytest.MonkeyPatch, budget: int, **settings: Any
) -> tuple[Any, list[Replica]]:
    """An engine whose replicas are opened in so many bytes, and these."""
    replicas: list[Replica] = []

    def open_cuda(name: str, artifact: Artifact, config: EngineConfig, index: int) -> Replica:
        replicas.append(module._open(name, artifact, config, CPU, budget, None))
        return replicas[-1]

    engine = on_gpu(FakeGpu(), **settings)
    monkeypatch.setattr("engine.runners.open_cuda.open_cuda", open_cuda)
    return engine, replicas


def greedy(model: str) -> list[Request]:
    return mixed_requests(6, model, sizes=[(64, 64), (90, 60)])[::2]


@pytest.mark.parametrize("model", ["tiny-gemma3", "tiny-qwen2-vl", LINEAR])
def test_a_replica_fits_its_budget_and_answers_as_on_the_cpu(
    start: Start, on_gpu: StartOnGpu, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    budget = TAKEN + 24 * MIB
    engine, replicas = opened(on_gpu, monkeypatch, budget, max_batch_size=4)
    assert together(engine, greedy(model)) == on_cpu(start, greedy(model))
    settle(engine, model)
    (one,) = replicas
    memory = one.runner.memory()
    assert 0 < memory.kv <= 24 * MIB
    assert memory.weights > 0
    assert memory.workspace == max(0, TAKEN - memory.weights - memory.kv)
    assert one.context_length == replica(engine, model).context_length > 0
    assert one.numerics.endswith(" cuda float32")


def test_a_step_holds_a_whole_image_however_small_chunks_are(
    on_gpu: StartOnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = opened(on_gpu, monkeypatch, TAKEN + 24 * MIB, prefill_chunk=4, max_batch_size=2)
    for answer in together(engine, greedy("tiny-gemma3")):
        assert answer[1] in ("length", "stop")


def test_a_budget_without_room_for_context_says_what_to_raise(
    on_gpu: StartOnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = opened(on_gpu, monkeypatch, TAKEN)
    with pytest.raises(DeviceOutOfMemory, match=r"takes 64 MiB before any context .* raise gpu_memory"):
        engine.load("tiny-qwen2-vl")
