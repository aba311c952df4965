"""Which captured graph a piece of a prompt takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.runtime.cuda.pieces import OUR_SIZES, SIZES, CapturedPieces
from engine.runtime.cuda.step import PackedStep, StepBuffer

BLOCK, CONTEXT, STEP = 256, 2048, 1056


class Session:
    """Notes the graphs that are run."""

    def __init__(self) -> None:
        self.ran: list[tuple[int, int | None]] = []

    def bind(self, inputs: Any, outputs: Any, reuse: Any = None) -> Any:
        raise AssertionError("pieces bind by themselves")

    def run(self, binding: Any, graph: int | None = None) -> None:
        self.ran.append((binding, graph))


def opened(sizes: tuple[int, ...], step_tokens: int = STEP) -> tuple[CapturedPieces, Session]:
    session = Session()
    pieces = CapturedPieces(
        session,
        lambda inputs, _: len(inputs["ids"]),  # the binding: the graph's size
        StepBuffer(1 << 16, torch.device("cpu")),
        sizes=sizes,
        axes=1,
        block_size=BLOCK,
        step_tokens=step_tokens,
        context_length=CONTEXT,
        feature_width=4,
        dtype=torch.float32,
    )
    return pieces, session


def piece(tokens: int, past: int = 0) -> PackedStep:
    ids, zero = np.zeros(tokens, np.int32), np.zeros(1, np.int32)
    tables = np.zeros((1, -(-(past + tokens) // BLOCK)), np.int32)
    return PackedStep(ids, ids[None], zero + tokens, zero + past, tables, zero, zero)


@pytest.mark.parametrize(
    ("sizes", "tokens", "wanted"),
    [
        (SIZES, 63, 64),
        (SIZES, 64, 128),
        (SIZES, 256, None),
        (OUR_SIZES, 256, 528),
        (OUR_SIZES, 1024, 1040),
        (OUR_SIZES, 1040, 2056),
        (OUR_SIZES, 2056, None),
        ((), 5, None),
    ],
)
def test_a_piece_takes_the_smallest_graph_that_leaves_a_token_to_fill(
    sizes: tuple[int, ...], tokens: int, wanted: int | None
) -> None:
    pieces, session = opened(sizes, step_tokens=2100)
    assert pieces.takes(piece(tokens)) == (wanted is not None)
    if wanted is not None:
        pieces.run(piece(tokens))
        assert session.ran == [(wanted, 1)]


def test_what_is_captured_is_what_runs_later() -> None:
    pieces, session = opened(OUR_SIZES)
    pieces.capture()
    captured = set(session.ran)
    for tokens, past in ((1, 0), (63, 449), (500, 0), (500, 1000), (1024, 1024)):
        pieces.run(piece(tokens, past))
    assert set(session.ran) == captured


def test_every_graph_that_is_captured_is_some_pieces() -> None:
    pieces, session = opened(OUR_SIZES, step_tokens=2100)
    pieces.capture()
    captured = set(session.ran)
    session.ran.clear()
    for longest in (512, 1024, 2048):
        for tokens in (least for least in (1, 64, 128, 256, 528, 1040) if least <= longest):
            pieces.run(piece(tokens, longest - tokens))
    assert set(session.ran) == captured


def test_no_graph_is_larger_than_a_step() -> None:
    pieces, _ = opened(OUR_SIZES, step_tokens=1025)  # of one sequence at a time
    assert pieces.takes(piece(527))
    assert not pieces.takes(piece(528))
