"""Runs the decoder: prefill of one row, decode of many, and the rows' KV memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.artifact import Artifact
from engine.spec import DecoderSpec


class Decoder:
    """One ONNX Runtime session and the KV memory of `rows` sequences of up to `context_length` tokens.

    One thread at a time. A row is empty until its first prefill.
    """

    rows: int
    context_length: int
    spec: DecoderSpec

    def __init__(self, artifact: Artifact, *, rows: int, context_length: int, threads: int) -> None:
        raise NotImplementedError

    def prefill(
        self,
        row: int,
        start: int,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        features: NDArray[np.float32],
        feature_index: NDArray[np.int64],
        *,
        logits: bool | Literal["all"],
    ) -> NDArray[np.float32]:
        """Compute `token_ids` [T] at `positions` [axes, T] and write their KV to [start, start + T) of `row`.

        `feature_index` [T] names the row of `features` [F, hidden] that replaces the token's embedding, -1 none.
        Returns logits of the last token [1, vocab], of none [0, vocab], or of all [T, vocab].
        """
        raise NotImplementedError

    def decode(
        self,
        rows: Sequence[int],
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """One token [B] for each of `rows`, at `positions` [axes, B], after the `lengths` [B] tokens the row holds.

        Returns logits [B, vocab].
        """
        raise NotImplementedError

    def read_kv(self, row: int, start: int, stop: int) -> NDArray[np.float32]:
        """A copy [layers, 2, kv_heads, stop - start, head_dim]."""
        raise NotImplementedError

    def write_kv(self, row: int, start: int, kv: NDArray[np.float32]) -> None:
        """Put back what `read_kv` gave; the row then holds start + kv.shape[3] tokens."""
        raise NotImplementedError

    def release(self, row: int) -> None:
        """Empty the row and give its memory back."""
        raise NotImplementedError
