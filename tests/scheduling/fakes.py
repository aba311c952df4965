"""Sequences and KV memory without a model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.preprocess import ImageInput
from engine.prompts import ImageSpan, Prompt
from engine.request import SamplingParams
from engine.sampling import SamplerState
from engine.scheduling.kv_cache import BLOCK
from engine.scheduling.sequence import Sequence

MAX_TOKENS = 1000


class FakeMemory:
    """Remembers which tokens' KV each row holds: the value at a place is the token id computed there."""

    def __init__(self, rows: int, length: int = 4096) -> None:
        self.rows = rows
        self.data = np.zeros((rows, length), np.float32)
        self.states = np.zeros((rows, 1), np.float32)  # what the tokens add up to that the row has seen

    def read_kv(self, row: int, start: int, stop: int) -> NDArray[np.float32]:
        return self.data[row, start:stop].copy().reshape(1, 1, 1, -1, 1)

    def write_kv(self, row: int, start: int, kv: NDArray[np.float32]) -> None:
        self.data[row, start : start + kv.shape[3]] = kv.ravel()

    def read_state(self, row: int) -> NDArray[np.float32]:
        state: NDArray[np.float32] = self.states[row].copy()
        return state

    def write_state(self, row: int, state: NDArray[np.float32]) -> None:
        self.states[row] = state

    def release(self, row: int) -> None:
        self.data[row] = self.states[row] = 0

    def compute(self, sequence: Sequence, stop: int) -> None:
        """What a prefill or decode call does."""
        assert sequence.row is not None
        tokens = sequence.tokens(sequence.computed, stop)
        self.data[sequence.row, sequence.computed : stop] = tokens
        self.states[sequence.row] = (self.states[sequence.row] + tokens.sum()) % 65536  # exact in fp32
        sequence.computed = stop


def image(key: bytes, tokens: int) -> ImageInput:
    return ImageInput(np.zeros((0,), np.uint8), (1, 0, 0), tokens, key)


def sequence(number: int, tokens: list[int] | int, images: list[tuple[int, ImageInput]] | None = None) -> Sequence:
    """A prompt of the given ids (or of that many fresh ones); images are (first place, image)."""
    ids = list(range(1000 * number, 1000 * number + tokens)) if isinstance(tokens, int) else tokens
    placed = images or []
    index = np.full(len(ids), -1, np.int64)
    offset = 0
    for start, one in placed:
        index[start : start + one.tokens] = np.arange(offset, offset + one.tokens)
        offset += one.tokens
    prompt = Prompt(
        token_ids=np.array(ids, np.int64),
        feature_index=index,
        positions=np.arange(len(ids))[None],
        position_delta=0,
        image_spans=tuple(ImageSpan(start, start + one.tokens, one.key) for start, one in placed),
        image_tokens=offset,
    )
    pictures = tuple(one for _, one in placed)
    state = SamplerState(SamplingParams(), prompt.token_ids)
    return Sequence(number, prompt, pictures, [None] * len(pictures), state, MAX_TOKENS)


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)
