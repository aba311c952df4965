"""A prompt as the decoder takes it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Tokens [start, stop) hold an image's placeholders, from its first to its last; `key` is `ImageInput.key`."""

    start: int
    stop: int
    key: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """`token_ids` int64 [T], image placeholders expanded.

    `feature_index` int64 [T] is the row in the request's image features, concatenated in order; -1 for text.
    `positions` int64 [axes, T] are rotary positions; the generated token at index t of the sequence has position
    t + `position_delta` on every axis.
    """

    token_ids: NDArray[np.int64] = field(repr=False)
    feature_index: NDArray[np.int64] = field(repr=False)
    positions: NDArray[np.int64] = field(repr=False)
    position_delta: int
    image_spans: tuple[ImageSpan, ...]
    image_tokens: int
