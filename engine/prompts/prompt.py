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
    """`token_ids` int64 [T], image placeholders expanded. With `whole_images` an image's tokens are computed in one
    piece that holds nothing else, because each of them sees all of them.

    `feature_index` int64 [T] is the row in the request's image features, concatenated in order; -1 for text.
    `positions` int64 [axes, T] are rotary positions; the generated token at index t of the sequence has position
    t + `position_delta` on every axis. `opens_thinking`: the answer begins inside the model's reasoning.
    """

    token_ids: NDArray[np.int64] = field(repr=False)
    feature_index: NDArray[np.int64] = field(repr=False)
    positions: NDArray[np.int64] = field(repr=False)
    position_delta: int
    image_spans: tuple[ImageSpan, ...]
    image_tokens: int
    opens_thinking: bool = False
    whole_images: bool = False

    @property
    def extent(self) -> int:
        """Tokens, or positions where those reach further: those of a video may be as far apart as its seconds."""
        return len(self.token_ids) + max(0, self.position_delta)

    def piece_end(self, start: int, stop: int) -> int:
        """Where a piece of the prompt from `start` to about `stop` ends: the rest of an image is one, of any size."""
        for span in self.image_spans if self.whole_images else ():
            if span.start <= start < span.stop:
                return span.stop
            if start < span.start < stop:
                return span.start
        return stop

    def cuts_image(self, place: int) -> bool:
        """Whether a piece that ends at `place` would leave a part of an image to the next."""
        return self.whole_images and any(span.start < place < span.stop for span in self.image_spans)
