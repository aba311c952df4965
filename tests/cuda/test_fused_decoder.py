"""The decoder in operators of our own: its graph in torch, and its kernels, interpreted, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.graphs.cuda.fused import Fusion, fusable
from engine.spec import FloatType
from tests.cuda.paged import Paged, Part
from tests.cuda.tiny import LINEAR, tiny_mrope
from tests.kernels.triton_tests import run_cases
from tests.runtime.cases import relative_error
from tests.runtime.conftest import MODELS, Tiny, make_tiny

__all__ = ["tiny_mrope"]

CASES = Path(__file__).with_name("fused_decoder_cases.py")
FUSIONS = [
    Fusion(linear=True, attention=False),
    Fusion(linear=False, attention=True),
    Fusion(linear=True, attention=True),
]
UNFUSED = {"gemma3", "gemma3_text", *LINEAR}  # whose layers our operators do not compute
NOISE: list[tuple[FloatType, float]] = [("float16", 6e-2), ("bfloat16", 1e-1)]  # int8 weights, and int8 rows


@pytest.fixture(scope="module", params=[name for name in MODELS if name not in UNFUSED])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory)


def test_layers_that_our_operators_do_not_compute_are_known(tmp_path_factory: pytest.TempPathFactory) -> None:
    known = {name for name in MODELS if fusable(make_tiny(name, tmp_path_factory).spec.decoder)}
    assert known == MODELS.keys() - UNFUSED


@pytest.mark.parametrize("fusion", FUSIONS, ids=["linear", "attention", "both"])
@pytest.mark.parametrize(("activations", "limit"), NOISE)
def test_the_fused_graphs_give_the_references_logits(
    tiny: Tiny, fusion: Fusion, activations: FloatType, limit: float
) -> None:
    case, other = tiny.case, tiny.text_case(60, 3)
    steps = [
        [Part(2, case, 0, 70), Part(0, other, 0, 33)],
        [Part(2, case, 70, 113)],
        *[[Part(2, case, 113 + n, 114 + n), Part(0, other, 33 + n, 34 + n)] for n in range(8)],
    ]
    paged = Paged(tiny, "int8", activations, fusion=fusion)
    found = np.concatenate([paged.step(*parts) for parts in steps])
    wanted = np.stack([part.case.logits[part.stop - 1] for parts in steps for part in parts])
    assert relative_error(found, wanted) < limit


def test_three_positions_that_differ_turn_as_in_the_reference(tiny_mrope: Tiny) -> None:
    case = tiny_mrope.case_anywhere(40, seed=6)
    paged = Paged(tiny_mrope, "fp16", "float16", fusion=Fusion(linear=True, attention=True))
    found = [paged.step(Part(1, case, start, stop)) for start, stop in ((0, 37), (37, 38), (38, 39), (39, 40))]
    assert relative_error(np.concatenate(found), case.logits[36:40]) < 1e-2


def test_the_kernels_compute_what_the_graph_says_in_onnx_runtime() -> None:
    run_cases(CASES, interpreted=True)
