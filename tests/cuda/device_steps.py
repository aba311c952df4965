"""A model's steps on a real device, beside the torch that stands in for it elsewhere and beside transformers."""

from __future__ import annotations

import numpy as np

from engine.spec import FloatType, Precision
from tests.cuda.one_operator import DEVICE
from tests.cuda.paged import CPU, Paged, Part
from tests.cuda.reference import ReferenceSession
from tests.runtime.cases import relative_error
from tests.runtime.conftest import PROMPT, Tiny


def steps(tiny: Tiny) -> list[list[Part]]:
    """Chunks with images, chunks beside decoding rows, rows alone, and a sequence that begins again."""
    case, other = tiny.case, tiny.text_case(60, 3)
    return [
        [Part(2, case, 0, 50)],
        [Part(2, case, 50, PROMPT), Part(0, other, 0, 33)],
        [Part(0, other, 33, 34), Part(2, case, PROMPT, PROMPT + 1), Part(3, other, 0, 17)],
        *[[Part(n, one, at + n_step, at + n_step + 1) for n, one, at in (
            (2, case, PROMPT + 1), (0, other, 34), (3, other, 17))] for n_step in range(6)],
        [Part(3, other, 0, 40), Part(2, case, PROMPT + 7, PROMPT + 8)],
        *[[Part(2, case, PROMPT + 8 + n, PROMPT + 9 + n), Part(3, other, 40 + n, 41 + n)] for n in range(4)],
    ]  # fmt: skip


def errors_of_steps(
    tiny: Tiny, precision: Precision, activations: FloatType
) -> tuple[list[float], list[float], list[float]]:
    """Relative errors of the logits, step by step: device to stand-in, device to transformers, and stand-in to
    transformers. They are printed.
    """
    on_device, stand_in = (Paged(tiny, precision, activations, device=device, block=64) for device in (DEVICE, CPU))
    assert isinstance(stand_in.session, ReferenceSession)
    errors: dict[str, list[float]] = {
        "device to stand-in": [],
        "device to transformers": [],
        "stand-in to transformers": [],
    }
    for parts in steps(tiny):
        found, wanted = on_device.step(*parts), stand_in.step(*parts)
        true = np.stack([part.case.logits[part.stop - 1] for part in parts])
        for kept, (one, other) in zip(errors.values(), ((found, wanted), (found, true), (wanted, true)), strict=True):
            kept.append(relative_error(one, other))
    for pair, kept in errors.items():
        print(f"\n{precision} {pair}, step by step: {' '.join(f'{error:.4f}' for error in kept)}")
    to_stand_in, to_true, own = errors.values()
    return to_stand_in, to_true, own
