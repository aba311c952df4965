"""Weights in the forms that CUDA graphs ask for, and the products computed with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.graphs.cuda import DeviceWeight
from engine.graphs.cuda.linear import cuda_linears
from engine.graphs.cuda.weights import BLOCK, CudaBuilder
from engine.runtime.cuda.weights import DeviceWeights
from engine.spec import FloatType, Precision
from tests.cuda.reference import ReferenceSession

CPU = torch.device("cpu")
DEMO = Path(__file__).resolve().parents[2] / "demo"
LINEAR = "vision.layers.0.qkv"  # with a bias


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Artifact]:
    storage, checkpoint = tmp_path_factory.mktemp("storage"), Checkpoint.open(DEMO)
    precisions: tuple[Precision, ...] = ("int8", "fp32", "bf16")
    return {precision: open_artifact(checkpoint, precision, storage) for precision in precisions}


def dense(artifact: Artifact, name: str) -> NDArray[np.float32]:
    """[out, in] as the bytes mean it."""
    weight = artifact.tensor(f"{name}.weight").astype(np.float32)
    return weight * artifact.tensor(f"{name}.scale")[:, None] if artifact.precision == "int8" else weight


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal(shape, np.float32)


def test_blocks_and_scales_are_the_int8_weights(artifacts: dict[Precision, Artifact]) -> None:
    artifact = artifacts["int8"]
    rows, columns = artifact.entries[f"{LINEAR}.weight"].shape
    asked = (64, 192)
    shape = (asked[1] - asked[0], columns // BLOCK)
    found = DeviceWeights(artifact, CPU).upload(
        [
            DeviceWeight("w", f"{LINEAR}.weight", asked, "blocks", np.dtype(np.uint8), (*shape, BLOCK)),
            DeviceWeight("s", f"{LINEAR}.scale", asked, "block_scales", np.dtype(np.float32), shape),
        ]
    )
    values = (found["w"].float() - 128) * found["s"][:, :, None]
    assert np.array_equal(values.reshape(shape[0], columns).numpy(), dense(artifact, LINEAR)[slice(*asked)])
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert rows > asked[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_weights_take_the_type_asked_for(
    artifacts: dict[Precision, Artifact], precision: Precision, dtype: torch.dtype
) -> None:
    artifact = artifacts[precision]
    name = str(dtype).removeprefix("torch.")
    shape = artifact.entries[f"{LINEAR}.weight"].shape
    wanted = DeviceWeight("w", f"{LINEAR}.weight", (0, shape[0]), "plain", np.dtype(name), shape)
    found = DeviceWeights(artifact, CPU).upload([wanted])["w"]
    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(dense(artifact, LINEAR)).to(dtype))


def test_rows_of_a_tensor_that_is_there_take_no_memory(artifacts: dict[Precision, Artifact]) -> None:
    artifact = artifacts["fp32"]
    rows, columns = artifact.entries[f"{LINEAR}.weight"].shape
    half = rows // 2
    weights = DeviceWeights(artifact, CPU)
    parts = [
        DeviceWeight(str(span), f"{LINEAR}.weight", span, "plain", np.dtype(np.float16), (span[1] - span[0], columns))
        for span in ((0, half), (half, rows))
    ]
    first, second = weights.upload(parts).values()
    assert weights.nbytes == rows * columns * 2
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    weights.upload(parts)
    assert weights.nbytes == rows * columns * 2


def run(
    builder: CudaBuilder, artifact: Artifact, inputs: dict[str, NDArray[Any]], output: torch.Tensor
) -> torch.Tensor:
    graph = builder.graph()
    session = ReferenceSession(graph.model, DeviceWeights(artifact, CPU).upload(graph.weights))
    session.run(session.bind({name: torch.from_numpy(array) for name, array in inputs.items()}, {"y": output}))
    return output


@pytest.mark.parametrize("rows", [None, (32, 96)])
@pytest.mark.parametrize(("precision", "activations"), [("int8", "float32"), ("fp32", "float32"), ("bf16", "float32")])
def test_a_linear_layer_is_the_product_with_what_the_bytes_mean(
    artifacts: dict[Precision, Artifact], precision: Precision, activations: FloatType, rows: tuple[int, int] | None
) -> None:
    artifact = artifacts[precision]
    weight, bias = dense(artifact, LINEAR), artifact.tensor(f"{LINEAR}.bias").astype(np.float32)
    span = slice(*(rows or (0, len(weight))))
    x = random(5, weight.shape[1])
    builder = CudaBuilder(artifact, activations)
    linears = cuda_linears(builder, int8=precision == "int8")
    value = builder.input("x", np.float32, ["T", weight.shape[1]])
    builder.output(linears.linear(value, LINEAR, rows), "y", np.float32)
    found = run(builder, artifact, {"x": x}, torch.zeros(5, len(weight[span])))
    np.testing.assert_allclose(found.numpy(), x @ weight[span].T + bias[span], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_an_embedding_is_the_row_that_the_bytes_mean(
    artifacts: dict[Precision, Artifact], precision: Precision
) -> None:
    artifact = artifacts[precision]
    table = dense(artifact, "embedding")
    ids = np.array([0, 7, len(table) - 1, 7], np.int32)
    builder = CudaBuilder(artifact, "float32")
    linears = cuda_linears(builder, int8=precision == "int8")
    builder.output(linears.embedding(builder.input("ids", np.int32, ["T"]), "embedding"), "y", np.float32)
    found = run(builder, artifact, {"ids": ids}, torch.zeros(4, table.shape[1]))
    np.testing.assert_allclose(found.numpy(), table[ids], rtol=1e-6)
