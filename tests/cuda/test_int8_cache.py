"""An int8 KV cache: how its scales are found and kept, and what it costs."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.checkpoints.kv_ranges import FILE, read_kv_ranges, write_kv_ranges
from engine.graphs.cuda import CudaGraph, StepInputs
from engine.graphs.cuda.tower import cuda_tower
from engine.runners.calibration import calibration_step, kv_ranges
from engine.runtime.cuda.cache_scales import measure_ranges, scale_inputs
from engine.runtime.cuda.encoder import CudaEncoder
from engine.runtime.cuda.weights import DeviceWeights
from tests.cuda.paged import CPU, Paged, Part, prefix_step
from tests.cuda.reference import ReferenceSession
from tests.cuda.tiny import tiny
from tests.runtime.cases import relative_error
from tests.runtime.conftest import PROMPT, STEPS, Tiny

__all__ = ["tiny"]


def measured(tiny: Tiny) -> NDArray[np.float32]:
    return measure_ranges(Paged(tiny, "fp16", "float16").decoder, prefix_step(tiny.text_case(150, seed=9), 150))


def scales_of(tiny: Tiny) -> dict[str, torch.Tensor]:
    return scale_inputs(measured(tiny), tiny.spec.decoder.attention_layers, CPU)


def test_logits_over_an_int8_cache_are_nearly_the_references(tiny: Tiny) -> None:
    paged, case = Paged(tiny, "fp16", "float16", scales=scales_of(tiny)), tiny.case
    steps = [Part(2, case, 0, 50), Part(2, case, 50, PROMPT)]
    steps += [Part(2, case, PROMPT + step, PROMPT + step + 1) for step in range(STEPS)]
    found = np.concatenate([paged.step(part) for part in steps])
    assert relative_error(found, case.logits[[part.stop - 1 for part in steps]]) < 0.06


def test_an_int8_cache_takes_half_the_memory(tiny: Tiny) -> None:
    scales = scales_of(tiny)
    assert (
        2 * Paged(tiny, "fp16", "float16", scales=scales).decoder.kv_bytes
        == Paged(tiny, "fp16", "float16").decoder.kv_bytes
    )


def test_no_key_at_any_position_and_no_value_of_the_text_is_cut_off(tiny: Tiny) -> None:
    ranges = measured(tiny)
    paged, case = Paged(tiny, "fp16", "float16"), tiny.text_case(150, seed=9)
    scales = scale_inputs(ranges, tiny.spec.decoder.attention_layers, CPU)
    layer = tiny.spec.decoder.attention_layers[0]
    for seed in (1, 2):
        step = prefix_step(case, 150)
        if tiny.spec.decoder.rope.axes == 3:  # elsewhere, a key is turned by its place
            positions = np.random.default_rng(seed).integers(0, 150, step.positions.shape)
            step = replace(step, positions=positions.astype(np.int32))
        paged.decoder.run(step)
        for part in ("key", "value"):
            cached = paged.decoder.cached(part, layer, step.tables[0], 150).float()
            assert (cached.abs() <= 127 * scales[StepInputs.cache_scale(part, layer)].squeeze(1)).all()


def test_a_silent_channel_and_a_silent_head_have_scales_that_divide() -> None:
    ranges = np.zeros((1, 2, 2, 4), np.float32)
    ranges[0, 0, 0] = [127, 0, 1, 2]
    scales = scale_inputs(ranges, [0], CPU)
    assert {tuple(scale.shape) for scale in scales.values()} == {(2, 1, 4)}
    assert scales[StepInputs.cache_scale("key", 0)][0, 0].tolist() == pytest.approx(
        [1.25, 1.25e-3, 0.00984, 0.0197], 0.01
    )
    assert all(bool(torch.isfinite(1 / scale).all()) for scale in scales.values())


@pytest.fixture
def artifact(storage: Path, tmp_path: Path) -> Artifact:
    return open_artifact(Checkpoint.open(storage / "models" / "tiny-qwen2-vl"), "fp16", tmp_path)


def _tower(artifact: Artifact) -> CudaEncoder:
    graph = cuda_tower(artifact, "float16")
    session = ReferenceSession(graph.model, DeviceWeights(artifact, CPU).upload(graph.weights))
    return CudaEncoder(session, artifact.spec, "float16", CPU)


def _no_session(graph: CudaGraph) -> NoReturn:
    raise AssertionError("measured again")


def test_ranges_are_measured_with_text_and_a_picture_once(storage: Path, artifact: Artifact) -> None:
    folder, opened = storage / "models" / "tiny-qwen2-vl", []

    def open_session(graph: CudaGraph) -> ReferenceSession:
        opened.append(graph)
        return ReferenceSession(graph.model, DeviceWeights(artifact, CPU).upload(graph.weights))

    tower = _tower(artifact)
    step = calibration_step(folder, artifact.spec, tower)
    assert step.features is not None
    assert step.feature_index is not None
    assert (step.feature_index >= 0).sum() == len(step.features)
    assert (step.feature_index < 0).sum() > 256
    ranges = kv_ranges(folder, artifact, "float16", open_session, tower, CPU)
    assert (ranges > 0).all()
    again = kv_ranges(folder, artifact, "float16", _no_session, tower, CPU)
    assert len(opened) == 1
    np.testing.assert_array_equal(again, ranges)


def test_damaged_ranges_are_none_and_are_replaced(artifact: Artifact) -> None:
    spec = artifact.spec.decoder
    ranges = np.random.default_rng(0).random((spec.layers, 2, spec.kv_heads, spec.head_dim), np.float32)
    file = artifact.folder / FILE
    assert read_kv_ranges(artifact) is None
    write_kv_ranges(artifact, ranges)
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole + b"\0", whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        file.write_bytes(damaged)
        assert read_kv_ranges(artifact) is None
    write_kv_ranges(artifact, ranges)
    np.testing.assert_array_equal(read_kv_ranges(artifact), ranges)
    assert [path.name for path in artifact.folder.glob(f"{FILE}*")] == [FILE]


def test_ranges_that_cannot_be_kept_are_said_and_no_error(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    spec = artifact.spec.decoder
    with caplog.at_level(logging.WARNING, "engine.checkpoints"):
        write_kv_ranges(artifact, np.ones((spec.layers, 2, spec.kv_heads, spec.head_dim), np.float32))
    assert "No space left on device" in caplog.text
    assert not list(artifact.folder.glob(f"{FILE}*"))
