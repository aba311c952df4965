"""Towers in operators of our own: their graphs in torch, against the CPU's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import tests.cuda.fused_operators  # noqa: F401  (registers the operators)
from engine.graphs.builder import TESSERA
from engine.graphs.cuda.fused import Fusion
from engine.graphs.cuda.tower import cuda_tower, tower_linears
from engine.runtime.cuda.encoder import CudaEncoder
from engine.runtime.cuda.weights import DeviceWeights
from engine.spec import FloatType
from tests.cuda.reference import ReferenceSession
from tests.cuda.test_tower import as_array, mixed
from tests.cuda.wide_towers import TOWERS, make_wide
from tests.kernels.triton_tests import run_cases
from tests.runtime.cases import relative_error
from tests.runtime.conftest import Tiny, make_tiny

CPU = torch.device("cpu")
CASES = Path(__file__).with_name("fused_tower_cases.py")
FUSION = Fusion(linear=True, attention=True, tower=True)


@pytest.fixture(scope="module", params=list(TOWERS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_wide(request.param, tmp_path_factory)


def encoder(tiny: Tiny, activations: FloatType, fusion: Fusion = FUSION) -> CudaEncoder:
    artifact = tiny.artifact("int8")
    graph = cuda_tower(artifact, activations, fusion)
    session = ReferenceSession(graph.model, DeviceWeights(artifact, CPU).upload(graph.weights))
    return CudaEncoder(session, tiny.spec, activations, CPU)


@pytest.mark.parametrize("activations", ["float16", "bfloat16"])
def test_a_fused_tower_is_as_close_to_fp32_as_the_cpus_int8_tower(tiny: Tiny, activations: FloatType) -> None:
    images = mixed(tiny)
    exact, on_cpu = (np.concatenate(tiny.encoder(precision).encode(images)) for precision in ("fp32", "int8"))
    found = as_array(encoder(tiny, activations).encode(images))
    error, allowed = relative_error(found, exact), relative_error(on_cpu, exact)
    print(f"\n{tiny.spec.family} {activations}: {error:.4f} from fp32; the CPU's int8 tower {allowed:.4f}")
    assert error < allowed * (1.1 if activations == "float16" else 1.2)  # bf16 rounds everything else as well


def test_every_layer_that_fits_is_one_node_with_its_norm(tiny: Tiny) -> None:
    """What is left of norms: one whose rows are joined before they are multiplied, or that a stock operator reads."""
    artifact, vision = tiny.artifact("int8"), tiny.spec.vision
    assert vision is not None
    nodes = onnx.load_model_from_string(cuda_tower(artifact, "float16", FUSION).model).graph.node
    ours = [node for node in nodes if (node.domain, node.op_type) == (TESSERA, "Linear")]
    layers = tower_linears(artifact)
    linear = {
        name.removesuffix(".scale") for name in artifact.entries if name.startswith("vision.") and "scale" in name
    }
    unfit = {name for name in linear if artifact.entries[f"{name}.weight"].shape[1] % 16}
    assert {layer.name for layer in layers} == linear - unfit
    assert len(ours) == len(layers) >= 3 * vision.layers
    assert all(weight.form == "stored" for weight in cuda_tower(artifact, "float16", FUSION).weights
               if weight.source.removesuffix(".weight") in linear - unfit)  # fmt: skip
    norms = [node for node in nodes if node.op_type.endswith("LayerNormalization")]
    behind_stock = sum(name.endswith("down") for name in unfit)
    assert len(norms) == max(1, behind_stock)


def test_layers_in_float_inputs_keep_their_rows(tiny: Tiny) -> None:
    chosen = "vision.layers.0.up"
    graph = cuda_tower(tiny.artifact("int8"), "float16", replace(FUSION, float_inputs=frozenset([chosen])))
    nodes = onnx.load_model_from_string(graph.model).graph.node
    paths = {node.input[1]: json.loads(node.attribute[0].s)["path"] for node in nodes if node.domain == TESSERA}
    assert [name for name, path in paths.items() if path == "float"] == [name for name in paths if chosen in name]


def test_without_the_switch_or_int8_weights_a_tower_is_the_stock_one(tiny: Tiny) -> None:
    artifact = tiny.artifact("int8")
    off = replace(FUSION, tower=False)
    assert cuda_tower(artifact, "float16", off) == cuda_tower(artifact, "float16")
    wide = tiny.artifact("fp16")
    assert cuda_tower(wide, "float16", FUSION) == cuda_tower(wide, "float16")


def test_a_tower_that_fits_nowhere_has_no_operators_of_ours(tmp_path_factory: pytest.TempPathFactory) -> None:
    """72 wide: what does not depend on that width does fit."""
    narrow = make_tiny("qwen2_vl", tmp_path_factory)
    assert {layer.name for layer in tower_linears(narrow.artifact("int8"))} == {
        *(f"vision.layers.{layer}.down" for layer in range(2)),
        "vision.merger",
        "vision.projection",
        "vision.patch",
    }
    images = mixed(narrow)
    wanted = np.concatenate(narrow.encoder("fp32").encode(images))
    assert relative_error(as_array(encoder(narrow, "float16").encode(images)), wanted) < 0.03


def test_the_kernels_compute_what_the_graph_says_in_onnx_runtime() -> None:
    run_cases(CASES, interpreted=True)
