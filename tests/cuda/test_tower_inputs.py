"""A tower's activations rounded layer by layer: the graph that measures it, and what is chosen of one with outliers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import tests.cuda.fused_operators  # noqa: F401  (registers the operators)
from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.checkpoints.float_inputs import FILE, TOWER_FILE
from engine.graphs.cuda import CudaGraph
from engine.graphs.cuda.tower import tower_linears
from engine.runners.tower_inputs import TowerRounding, measured_tower_inputs, tower_float_inputs
from engine.runtime.cuda.weights import DeviceWeights
from engine.spec import FloatType
from tests.cuda.reference import ReferenceSession
from tests.cuda.test_fused_tower import FUSION, encoder
from tests.cuda.wide_towers import make_wide, wide_model
from tests.runtime import models
from tests.runtime.cases import Picture, pictures
from tests.runtime.conftest import Tiny

CPU = torch.device("cpu")
OUTLIER = 500.0


def open_session(artifact: Artifact, graph: CudaGraph) -> ReferenceSession:
    return ReferenceSession(graph.model, DeviceWeights(artifact, CPU).upload(graph.weights))


def rounding_of(artifact: Artifact, image: Picture, activations: FloatType = "float16") -> TowerRounding:
    return TowerRounding(artifact, activations, CPU, partial(open_session, artifact), image)


@pytest.fixture(scope="module", params=["smolvlm", "qwen2_5_vl", "qwen3_vl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_wide(request.param, tmp_path_factory)


def image_of(tiny: Tiny) -> Picture:
    return pictures(tiny.spec, [tiny.shapes[0]], seed=9)[0]


@pytest.mark.parametrize("rounded", [(), ("vision.layers.1.up",), "all"])
def test_layers_that_are_rounded_give_the_features_of_the_fused_tower(
    tiny: Tiny, rounded: tuple[str, ...] | str
) -> None:
    """In fp32, which the kernels cannot: a rounding of 16 bits that differs would move others by a step of int8. With
    all layers rounded one in fp32 does so now and then, and noise that is another's would differ by 1.4 of the change.
    """
    image, artifact = image_of(tiny), tiny.artifact("int8")
    rounding = rounding_of(artifact, image, "float32")
    chosen = frozenset(rounding.names if rounded == "all" else rounded)
    fused = encoder(tiny, "float32", replace(FUSION, float_inputs=frozenset(rounding.names) - chosen))
    found, wanted = rounding.features(chosen), fused.encode([image])[0].float()
    exact = rounding.features(frozenset())
    error, change = ((x - wanted).square().mean().sqrt() for x in (found, exact))
    share = 0.9 if rounded == "all" else 0.1
    assert float(error) < max(share * float(change), 1e-5 * float(wanted.std()))
    assert bool(chosen) == (float(change) > 1e-3 * float(wanted.std())) == (rounding.change(chosen) > 1e-6)


def test_a_layer_whose_input_has_an_outlier_is_found(tmp_path: Path) -> None:
    """The same function, with a channel that is large between a norm and the product that reads it."""
    model = models.randomise(wide_model("qwen2_vl"))
    block = model.get_submodule("model.visual.blocks.1")
    with torch.no_grad():
        for name in ("weight", "bias"):
            block.get_parameter(f"norm1.{name}")[5] *= OUTLIER
        block.get_parameter("attn.qkv.weight")[:, 5] /= OUTLIER
    artifact = open_artifact(Checkpoint.open(models.save(model, tmp_path / "checkpoint")), "int8", tmp_path)
    image = pictures(artifact.spec, [(8, 6)], seed=9)[0]
    rounding = rounding_of(artifact, image)
    without = rounding.change(frozenset(rounding.names) - {"vision.layers.1.qkv"})
    assert rounding.change(frozenset({"vision.layers.1.qkv"})) > 5 * without
    chosen = partial(measured_tower_inputs, artifact, "float16", CPU, partial(open_session, artifact), image)
    assert chosen(budget=1.5 * without) == {"vision.layers.1.qkv"}
    assert chosen(budget=100.0) == frozenset()


def test_what_was_chosen_is_kept_beside_the_artifact_and_apart_from_the_decoders(storage: Path, tmp_path: Path) -> None:
    folder = storage / "models" / "tiny-smolvlm"
    artifact = open_artifact(Checkpoint.open(folder), "int8", tmp_path)

    def measured_again(graph: CudaGraph) -> NoReturn:
        raise AssertionError("measured again")

    chosen = tower_float_inputs(folder, artifact, "float16", CPU, partial(open_session, artifact))
    assert chosen <= {layer.name for layer in tower_linears(artifact)}
    assert tower_float_inputs(folder, artifact, "float16", CPU, measured_again) == chosen
    assert (artifact.folder / TOWER_FILE).exists()
    assert not (artifact.folder / FILE).exists()
