"""int8 computes exactly the stated rule: weights per output row, activations per token, both symmetric."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
from numpy.typing import NDArray

from engine.checkpoints.quantise import quantise_rows
from engine.graphs.builder import GraphBuilder
from engine.graphs.cpu.linear import Int8Linears
from engine.runtime.session import open_session
from tests.runtime.cases import decode, prefill
from tests.runtime.conftest import PROMPT, STEPS, Tiny


def reference(x: NDArray[np.float32], weight: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float64]:
    maximum = np.abs(x).max(axis=1, keepdims=True)
    step = np.float32(1 / 127)
    quantised = np.rint(np.divide(x, maximum, out=np.zeros_like(x), where=maximum > 0) / step)
    product: NDArray[np.float64] = quantised.astype(np.float64) @ weight.T.astype(np.float64)
    return product * (step * scale) * maximum


@pytest.mark.parametrize("name", ["layers.0.qkv", "layers.1.down", "vision.layers.0.up", "vision.patch"])
def test_a_linear_layer_is_the_rule_to_the_last_bits(tiny_vlm: Tiny, name: str) -> None:
    artifact = tiny_vlm.artifact("int8")
    weight, scale = artifact.tensor(f"{name}.weight"), artifact.tensor(f"{name}.scale")
    builder = GraphBuilder(artifact)
    x = builder.input("x", np.float32, ["T", weight.shape[1]])
    builder.output(Int8Linears(builder).linear(x, name), "y", np.float32)
    session: ort.InferenceSession = open_session(builder.serialise(), artifact, threads=2)
    rows = np.random.default_rng(0).standard_normal((40, weight.shape[1])).astype(np.float32)
    rows[3] *= 1000  # a loud row does not blur its neighbours
    rows[5] = 0  # and a silent one is not a division by zero
    found = session.run(["y"], {"x": rows})[0]
    wanted = reference(rows, weight, scale)
    if f"{name}.bias" in artifact.entries:
        wanted = wanted + artifact.tensor(f"{name}.bias")
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(axis=1).min())


def test_every_matrix_is_stored_in_eight_bits_and_every_vector_in_32(tiny: Tiny) -> None:
    artifact = tiny.artifact("int8")
    full = tiny.artifact("fp32")
    for name, entry in full.entries.items():
        kept = name == "vision.position.weight" or len(entry.shape) == 1
        assert artifact.entries[name].dtype == ("float32" if kept else "int8"), name
        if not kept:
            scaled = artifact.tensor(name) * artifact.tensor(name.removesuffix(".weight") + ".scale")[:, None]
            assert np.abs(scaled - full.tensor(name)).max() <= np.abs(full.tensor(name)).max() / 127 / 1.9


def test_rows_of_zeros_and_of_one_value_quantise() -> None:
    rows = np.array([[0, 0, 0], [2, -4, 1], [-127, 63.5, 64.5]], np.float32)
    values, scale = quantise_rows(rows)
    assert values.tolist() == [[0, 0, 0], [64, -127, 32], [-127, 64, 64]]
    assert scale.tolist() == [0.0, np.float32(4) / np.float32(127), 1.0]


def test_logits_point_where_those_of_fp32_do(tiny: Tiny) -> None:
    case, decoder = tiny.case, tiny.decoder("int8")
    found = prefill(decoder, 0, case, 0, PROMPT, features=tiny.features("int8"))
    steps = [decode(decoder, [(0, case, PROMPT + step)])[0] for step in range(STEPS)]
    found = np.concatenate([found, np.stack(steps)])
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(case.logits, axis=1)
    cosine = (found * case.logits).sum(axis=1) / norms
    assert cosine.min() > 0.99, "random weights; a trained model is closer"
