"""A tower's MLP through ONNX Runtime: our kernels as its operators, against their torch twins.

Run by test_fused_tower.py in a process whose Triton interprets: the graph then runs on ONNX Runtime's CPU provider.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.graphs.cuda import CudaGraph
from engine.graphs.cuda.fused_tower import FusedTowerDialect, TowerLinear
from engine.graphs.cuda.tower import TowerInputs
from engine.graphs.cuda.weights import CudaBuilder
from engine.kernels import operators
from engine.kernels.operators import workspace_bytes
from engine.runners.tower_parts import tower_parts
from engine.runtime.cuda.session import GraphSession
from engine.runtime.cuda.weights import DeviceWeights, torch_type
from engine.spec import FloatType
from tests.cuda.interpreted import CPU, MULTIPROCESSORS, TILES, interpreted_session
from tests.cuda.reference import ReferenceSession
from tests.cuda.wide_towers import make_wide
from tests.runtime.cases import relative_error
from tests.runtime.conftest import Tiny

ROWS = 21


def graph_of(
    tiny: Tiny, activations: FloatType, float_inputs: tuple[str, ...] = ()
) -> tuple[CudaGraph, list[TowerLinear]]:
    """From the residual before a block's MLP to the next one's queries, keys and values: nodes of ours alone."""
    builder, spec = CudaBuilder(tiny.artifact("int8"), activations), tiny.spec.vision
    assert spec is not None
    dialect = FusedTowerDialect(builder, spec, float_inputs)
    x = builder.input("x", builder.dtype.type, ["T", spec.hidden])
    normed = dialect.layer_norm(x, "vision.layers.0.mlp_norm", spec.norm_eps)
    mlp = dialect.activated(normed, "vision.layers.0.up", spec.activation)
    normed, _ = dialect.add_layer_norm(mlp, "vision.layers.0.down", x, "vision.layers.1.attention_norm", spec.norm_eps)
    builder.output(dialect.linear(normed, "vision.layers.1.qkv"), "y", builder.dtype.type)
    return builder.graph(), dialect.layers


def output(session: GraphSession, tiny: Tiny, graph: CudaGraph, activations: FloatType) -> torch.Tensor:
    spec = tiny.spec.vision
    assert spec is not None
    x = torch.randn((ROWS, spec.hidden), generator=torch.Generator().manual_seed(4)).to(torch_type(activations))
    none = torch.zeros(1, 2)
    inputs = dict.fromkeys(graph.inputs, none) | {"x": x}
    inputs |= {name: none.int() for name in (TowerInputs.OFFSET, TowerInputs.WINDOW_OFFSET)}
    inputs |= {name: none[0].int() for name in (TowerInputs.STARTS, TowerInputs.WINDOW_STARTS)}
    tables = {TowerInputs.COSINE, TowerInputs.SINE}
    inputs |= {name: torch.zeros((1, spec.hidden // spec.heads // 2), dtype=torch.float16) for name in tables}
    y = torch.zeros((ROWS, 3 * spec.hidden), dtype=x.dtype)
    session.run(session.bind(inputs, {"y": y}))
    return y


def ours(tiny: Tiny, folder: Path, activations: FloatType, float_inputs: tuple[str, ...] = ()) -> torch.Tensor:
    artifact = tiny.artifact("int8")
    graph, layers = graph_of(tiny, activations, float_inputs)
    tower = [part.layer for part in tower_parts(layers, tiny.spec.vision)]
    needed = workspace_bytes(tiny.spec.decoder, TILES, MULTIPROCESSORS, rows=1, decoding=[], block_size=16, tower=tower)
    weights, dtype = DeviceWeights(artifact, CPU).upload(graph.weights), torch_type(activations)
    found = interpreted_session(graph, weights, artifact.folder, folder, dtype, needed)
    return output(found, tiny, graph, activations)


@pytest.mark.parametrize(
    ("name", "activations", "float_inputs"),
    [
        ("smolvlm", "float16", ()),  # layer norms, an approximated GELU
        ("qwen2_vl", "float16", ("vision.layers.0.up",)),  # quick GELU
        ("qwen2_5_vl", "bfloat16", ()),  # RMS norms, a gate
        ("qwen3_vl", "float16", ("vision.layers.0.down", "vision.layers.1.qkv")),
    ],
)
def test_an_mlp_is_that_of_the_torch_operators(
    tmp_path_factory: pytest.TempPathFactory, name: str, activations: FloatType, float_inputs: tuple[str, ...]
) -> None:
    tiny = make_wide(name, tmp_path_factory)
    found = ours(tiny, tmp_path_factory.mktemp("kernels"), activations, float_inputs)
    graph, _ = graph_of(tiny, activations, float_inputs)
    twins = ReferenceSession(graph.model, DeviceWeights(tiny.artifact("int8"), CPU).upload(graph.weights))
    wanted = output(twins, tiny, graph, activations)
    error = relative_error(found.float().numpy(), wanted.float().numpy())
    print(error)
    assert error < (1e-2 if activations == "float16" else 4e-2)  # a rounding that differs is a whole step of int8


def test_rows_in_several_launches_are_the_same_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, folder = make_wide("qwen2_vl", tmp_path_factory), tmp_path_factory.mktemp("kernels")
    whole = ours(tiny, folder, "float16")
    monkeypatch.setattr(operators, "ROWS_AT_ONCE", 8)
    assert torch.equal(ours(tiny, folder, "float16"), whole)
