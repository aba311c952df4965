"""The decoders of the CUDA dialect against transformers, in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.spec import FloatType, Precision
from tests.cuda.paged import Paged, Part
from tests.cuda.reference import ReferenceSession
from tests.cuda.tiny import any_mrope, tiny, tiny_mrope
from tests.runtime.cases import relative_error
from tests.runtime.conftest import PROMPT, STEPS, Tiny, make_tiny

__all__ = ["any_mrope", "tiny", "tiny_mrope"]


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


@pytest.mark.parametrize(("start", "stop"), [(0, 40), (40, 63), (0, 63), (63, 64), (30, 80)])
def test_a_piece_from_a_captured_graph_gives_the_references_logits(tiny_mrope: Tiny, start: int, stop: int) -> None:
    """Alone in its step; what comes before it, an image among that, was computed operator by operator."""
    case = tiny_mrope.case
    paged = Paged(tiny_mrope, "fp16", "float16")
    paged.decoder.capture()
    session = paged.session
    assert isinstance(session, ReferenceSession)
    session.runs.clear()
    other = tiny_mrope.text_case(60, 3)
    if start:
        paged.step(Part(2, case, 0, start), Part(0, other, 0, 1))
    found = paged.step(Part(2, case, start, stop))
    assert relative_error(found, case.logits[stop - 1 : stop]) < 1e-2
    assert all(run is None for run in session.runs) == (stop - start == 1) or session.runs[-1] is not None
    after = paged.step(Part(2, case, stop, stop + 1))
    assert relative_error(after, case.logits[stop : stop + 1]) < 1e-2


def test_a_step_in_parts_gives_the_references_logits(tiny_mrope: Tiny) -> None:
    """Image and text, chunks and decoding rows, slots in any order."""
    paged = Paged(tiny_mrope, "fp16", "float16", in_parts=True)
    paged.decoder.capture()
    session = paged.session
    assert isinstance(session, ReferenceSession)
    session.runs.clear()
    assert _mixed_steps(tiny_mrope, paged) < 1e-2
    assert session.runs, "pieces"
    assert None not in session.runs, "all of them captured"


def test_decode_steps_go_on_without_being_told_anything_anew(tiny_mrope: Tiny) -> None:
    case, other = tiny_mrope.case, tiny_mrope.text_case(60, 3)
    paged, plain = (Paged(tiny_mrope, "fp16", "float16") for _ in range(2))
    for one in (paged, plain):
        one.decoder.capture()
        one.step(Part(2, case, 0, PROMPT), Part(0, other, 0, 33))
    for further in range(6):
        parts = [Part(2, case, PROMPT + further, PROMPT + further + 1), Part(0, other, 33 + further, 34 + further)]
        expected = plain.step(*parts)
        if not further:
            found = paged.step(*parts)
            continue
        tokens = [int(part.case.token_ids[part.start]) for part in parts]
        paged.slot_tokens[[2, 0]] = torch.tensor(tokens, dtype=torch.int32)  # as the sampler leaves them
        result = paged.decoder.go_on()
        assert result is not None
        found = result[0].float().numpy()
        assert np.array_equal(found, expected)
