"""int8 computes exactly the stated rule: weights per output row, activations per token, both symmetric."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch
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


@pytest.mark.parametrize("name", ["layers.0.gate_up", "layers.1.down", "vision.layers.0.up", "vision.patch"])
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
        # Of linear attention, the small matrices behind the decay, whose errors would add up, and the convolution.
        kept = name == "vision.position.weight" or len(entry.shape) == 1 or name.split(".")[-2] in ("gates", "conv")
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
    if tiny.spec.decoder.delta_net is not None:
        # A norm lifts each head's output of linear attention to one size, however near zero it is: with random weights,
        # some tokens consist of what rounding left of them. So rounding must be that of the reference.
        case = tiny.text_case(PROMPT + STEPS, seed=9)
        wanted, features = rounded_logits(tiny, case.token_ids), case.features
    else:
        case, features = tiny.case, tiny.features("int8")
        wanted = case.logits
    decoder = tiny.decoder("int8")
    found = prefill(decoder, 0, case, 0, PROMPT, features=features)
    steps = [decode(decoder, [(0, case, PROMPT + step)])[0] for step in range(STEPS)]
    cosine = np.sort(cosines(np.concatenate([found, np.stack(steps)]), wanted))
    # A last bit of fp32 decides now and then which way a value is rounded, and such a token shows it.
    lowest = cosine[len(cosine) // 20] if tiny.spec.decoder.delta_net is not None else cosine[0]
    assert lowest > 0.99, "random weights; a trained model is closer"


def rounded_logits(tiny: Tiny, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """The reference's, with weights and activations of its linear layers rounded as int8 rounds them."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        maximum = x.abs().amax(-1, keepdim=True)
        return torch.round(x / maximum * 127) / 127 * maximum

    model = copy.deepcopy(tiny.reference)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(("in_proj_a", "in_proj_b")):
            module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]),))
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            small = name.endswith(("in_proj_a", "in_proj_b"))
            module.weight.data = module.weight.data if small else rounded(module.weight.data)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(input_ids=torch.tensor(token_ids)[None]).logits[0].numpy()
    return logits


def cosines(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row with its counterpart."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    cosine: NDArray[np.float32] = (found * wanted).sum(axis=1) / norms
    return cosine
