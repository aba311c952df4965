"""Activations rounded layer by layer: the graph that measures it, and what is chosen for a model with outliers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import tests.cuda.fused_operators  # noqa: F401  (registers the operators)
from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.checkpoints.float_inputs import FILE, read_float_inputs, write_float_inputs
from engine.graphs.cuda import CudaGraph, cuda_decoder
from engine.graphs.cuda.fused import Fusion
from engine.graphs.cuda.rounded import linear_names
from engine.graphs.cuda.tower import cuda_tower
from engine.runners.float_inputs import Rounding, float_inputs, measured_float_inputs
from engine.runtime.cuda.decoder import PagedDecoder
from engine.runtime.cuda.encoder import CudaEncoder
from engine.runtime.cuda.step import PackedStep
from engine.runtime.cuda.weights import DeviceWeights
from engine.spec import FloatType
from tests.cuda.reference import ReferenceSession
from tests.runtime import models

CPU = torch.device("cpu")
TOKENS = 48
OUTLIER = 500.0


def open_session(artifact: Artifact, graph: CudaGraph) -> ReferenceSession:
    return ReferenceSession(graph.model, DeviceWeights(artifact, CPU).upload(graph.weights))


def converted(model: PreTrainedModel, folder: Path) -> Artifact:
    checkpoint = Checkpoint.open(models.save(model, folder / "checkpoint"))
    return open_artifact(checkpoint, "int8", folder / "storage")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return converted(models.randomise(models.qwen2(tie_word_embeddings=True)), tmp_path)


def step(start: int = 0) -> PackedStep:
    zero = np.zeros(1, np.int32)
    ids = np.random.default_rng(4).integers(start, models.VOCAB - 10, TOKENS).astype(np.int32)
    rows = np.arange(TOKENS, dtype=np.int32)
    return PackedStep(ids, rows[None], zero + TOKENS, zero, zero[None] + 1, rows, rows)


def fused_logits(artifact: Artifact, float_layers: frozenset[str]) -> torch.Tensor:
    fusion = Fusion(linear=True, attention=False, float_inputs=float_layers)
    graph = cuda_decoder(artifact, "float16", TOKENS, fusion=fusion)
    decoder = PagedDecoder(
        *(open_session(artifact, graph), artifact.spec.decoder, torch.zeros(TOKENS + 1, dtype=torch.int32)),
        dtype=torch.float16,
        blocks=2,
        block_size=256,
        slots=TOKENS,
        context_length=TOKENS,
        step_tokens=TOKENS,
    )
    return decoder.run(step())[0].float()


@pytest.mark.parametrize("rounded", [(), ("layers.0.qkv",), ("layers.1.down", "embedding"), "all"])
def test_layers_that_are_rounded_compute_what_the_fused_graph_computes_in_int8(
    artifact: Artifact, rounded: tuple[str, ...] | str
) -> None:
    names = linear_names(artifact.spec.decoder)
    chosen = frozenset(names if rounded == "all" else rounded)
    rounding = Rounding(artifact, "float16", partial(open_session, artifact), step(), CPU, names)
    found, wanted = rounding.logits(chosen).float(), fused_logits(artifact, frozenset(names) - chosen)
    exact = fused_logits(artifact, frozenset(names))
    # A normed row that is not rounded to 16 bits before it is quantised gives a few other values.
    error, change = ((x - wanted).square().mean().sqrt() for x in (found, exact))
    assert float(error) < max(0.9 * float(change), 1e-3 * float(wanted.std()))
    assert bool(chosen) == (float(change) > 1e-3 * float(wanted.std()))


def test_every_linear_layer_of_the_artifact_has_its_place_and_no_other(artifact: Artifact) -> None:
    matrices = {name.removesuffix(".scale") for name in artifact.entries if name.endswith(".scale")}
    assert set(linear_names(artifact.spec.decoder)) == matrices


@pytest.mark.parametrize("activations", ["float16", "bfloat16"])
def test_a_layer_whose_input_has_an_outlier_is_found(activations: FloatType, tmp_path: Path) -> None:
    """The same function, with a channel that is large between a norm and the product that reads it."""
    model = models.randomise(models.qwen2(tie_word_embeddings=True))
    layer = model.get_submodule("model.layers.1")
    with torch.no_grad():
        layer.get_parameter("input_layernorm.weight")[5] *= OUTLIER
        for name in ("q_proj", "k_proj", "v_proj"):
            layer.get_parameter(f"self_attn.{name}.weight")[:, 5] /= OUTLIER
    artifact = converted(model, tmp_path)
    names = linear_names(artifact.spec.decoder)
    rounding = Rounding(artifact, activations, partial(open_session, artifact), step(), CPU, names)
    without = rounding.divergence(frozenset(names) - {"layers.1.qkv"})
    assert rounding.divergence(frozenset({"layers.1.qkv"})) > 5 * without
    found = measured_float_inputs(artifact, activations, partial(open_session, artifact), step(), CPU, 1.5 * without)
    assert found == {"layers.1.qkv"}


def test_what_was_chosen_is_kept_beside_the_artifact(storage: Path, tmp_path: Path) -> None:
    folder = storage / "models" / "tiny-qwen2-vl"
    artifact = open_artifact(Checkpoint.open(folder), "int8", tmp_path)

    def measured_again(graph: CudaGraph) -> NoReturn:
        raise AssertionError("measured again")

    graph = cuda_tower(artifact, "float16")
    session = ReferenceSession(graph.model, DeviceWeights(artifact, CPU).upload(graph.weights))
    tower = CudaEncoder(session, artifact.spec, "float16", CPU)
    chosen = float_inputs(folder, artifact, "float16", partial(open_session, artifact), tower, CPU)
    assert chosen <= set(linear_names(artifact.spec.decoder))
    assert float_inputs(folder, artifact, "float16", measured_again, tower, CPU) == chosen


def test_damaged_foreign_and_unknown_choices_are_none(artifact: Artifact) -> None:
    names, file = linear_names(artifact.spec.decoder), artifact.folder / FILE
    assert read_float_inputs(artifact, names) is None
    write_float_inputs(artifact, frozenset(names[:2]))
    whole = file.read_text()
    assert read_float_inputs(artifact, names) == frozenset(names[:2])
    damages = ["", whole[:-4], "[]", "null", whole.replace(artifact.digest, "0"), whole.replace("layers.0.qkv", "x")]
    damages += [whole.replace('"version": 1', '"version": 0'), whole.replace('"layers.0.qkv"', "{}")]
    for damaged in damages:
        assert damaged != whole
        file.write_text(damaged)
        assert read_float_inputs(artifact, names) is None
    assert [path.name for path in artifact.folder.glob(f"{FILE}*")] == [FILE]


def test_a_choice_that_cannot_be_kept_is_said_and_no_error(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    write_float_inputs(artifact, frozenset())
    assert "No space left on device" in caplog.text
    assert not list(artifact.folder.glob(f"{FILE}*"))
