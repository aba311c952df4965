"""The decoders of the CUDA dialect against transformers, in torch."""

from __future__ import annotations

import numpy as np
import pytest

from engine.spec import FloatType, Precision
from tests.cuda.paged import Paged, Part
from tests.cuda.reference import ReferenceSession
from tests.cuda.tiny import any_mrope, tiny
from tests.runtime.cases import relative_error
from tests.runtime.conftest import PROMPT, STEPS, Tiny, make_tiny

__all__ = ["any_mrope", "tiny"]


PRECISIONS: list[tuple[Precision, FloatType, float]] = [
    ("fp16", "float16", 1e-2),
    ("bf16", "bfloat16", 8e-2),
    ("fp32", "float32", 1e-4),
]


def at_most(limit: float, tiny: Tiny) -> float:
    """A norm lifts each head's output of linear attention to one size, however near zero it is: with random weights, 16
    bits cost more there, and transformers in 16 bits is as far from itself in 32."""
    return 3 * limit if tiny.spec.decoder.delta_net and limit > 1e-4 else limit


@pytest.mark.parametrize(("precision", "activations", "limit"), PRECISIONS)
def test_chunks_and_decoding_rows_in_one_call_give_the_references_logits(
    tiny: Tiny, precision: Precision, activations: FloatType, limit: float
) -> None:
    assert _mixed_steps(tiny, Paged(tiny, precision, activations)) < at_most(limit, tiny)


@pytest.mark.parametrize(("precision", "activations", "limit"), PRECISIONS)
def test_three_positions_that_differ_turn_as_in_the_reference(
    any_mrope: Tiny, precision: Precision, activations: FloatType, limit: float
) -> None:
    case = any_mrope.case_anywhere(40, seed=6)
    paged = Paged(any_mrope, precision, activations)
    found = [paged.step(Part(1, case, start, stop)) for start, stop in ((0, 20), (20, 39), (39, 40))]
    assert relative_error(np.concatenate(found), case.logits[[19, 38, 39]]) < at_most(limit, any_mrope)


def test_plain_operators_write_the_cache_in_place_in_onnx_runtime(tiny: Tiny) -> None:
    if tiny.spec.decoder.delta_net:
        pytest.skip("the CPU provider does not have linear attention over packed sequences")
    assert _mixed_steps(tiny, Paged(tiny, "fp32", "float32", cpu_provider=True)) < 1e-4


@pytest.mark.parametrize(("precision", "activations", "limit"), PRECISIONS)
def test_a_row_decodes_beside_an_image_that_sees_itself(
    tmp_path_factory: pytest.TempPathFactory, precision: Precision, activations: FloatType, limit: float
) -> None:
    tiny = make_tiny("gemma3", tmp_path_factory)
    case, other = tiny.case, tiny.text_case(60, 3)
    paged = Paged(tiny, precision, activations)
    paged.step(Part(0, other, 0, 30), Part(2, case, 0, 4))
    found = [paged.step(Part(2, case, 4, 20), Part(0, other, 30, 31)), paged.step(Part(2, case, 20, 50))]
    wanted = np.stack([case.logits[19], other.logits[30], case.logits[49]])
    assert relative_error(np.concatenate(found), wanted) < limit


def test_the_rehearsal_takes_the_memory_of_images_that_see_themselves_too(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    decoder = Paged(make_tiny("gemma3", tmp_path_factory), "bf16", "bfloat16").decoder
    sessions = (decoder._session, decoder._mutual)
    assert all(isinstance(session, ReferenceSession) and not session.runs for session in sessions)
    decoder.rehearse()
    assert [session.runs for session in sessions if isinstance(session, ReferenceSession)] == [[None], [None]]


def _mixed_steps(tiny: Tiny, paged: Paged) -> float:
    """The logits' error over steps of chunks and decoding rows."""
    case = tiny.case
    other, third = tiny.text_case(60, 3), tiny.text_case(70, 4)
    steps = [
        [Part(2, case, 0, 50)],
        [Part(2, case, 50, PROMPT), Part(0, other, 0, 33)],
        [Part(0, other, 33, 34), Part(2, case, PROMPT, PROMPT + 1), Part(3, third, 0, 17)],
        [Part(3, third, 17, 18), Part(2, case, PROMPT + 1, PROMPT + 2), Part(0, other, 34, 60)],
        *[[Part(2, case, PROMPT + n, PROMPT + n + 1), Part(3, third, 16 + n, 17 + n)] for n in range(2, STEPS)],
    ]
    found = np.concatenate([paged.step(*parts) for parts in steps])
    wanted = np.stack([part.case.logits[part.stop - 1] for parts in steps for part in parts])
    return relative_error(found, wanted)
