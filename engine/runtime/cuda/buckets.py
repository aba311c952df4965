"""The sizes for which decode steps are captured: batch and context, rounded up."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

_FIRST_CONTEXT = 512  # tokens; attention over less takes no longer


@dataclass(frozen=True, slots=True)
class Bucket:
    """Decode steps of up to `batch` sequences whose longest has more than `shorter` and at most `context` tokens."""

    batch: int
    shorter: int
    context: int


class Buckets:
    """Every size up to the limits has a bucket; padding is at most 3/8 of the batch and half of the context."""

    def __init__(self, max_batch: int, context_length: int) -> None:
        self._batches = list(_batches(max_batch))
        self._contexts = list(contexts(context_length))
        starts = (0, *self._contexts)
        self._buckets = [
            [Bucket(batch, shorter, context) for batch in self._batches]
            for shorter, context in zip(starts, self._contexts, strict=False)
        ]

    def __iter__(self) -> Iterator[Bucket]:
        """The largest first: what it takes of working memory is enough for all others."""
        for column in reversed(self._buckets):
            yield from reversed(column)

    def __len__(self) -> int:
        return len(self._batches) * len(self._contexts)

    def find(self, batch: int, longest: int) -> Bucket:
        """The smallest for that many sequences of up to that many tokens. Raises ValueError beyond the limits."""
        row, column = bisect.bisect_left(self._batches, batch), bisect.bisect_left(self._contexts, longest)
        if row == len(self._batches) or column == len(self._contexts):
            raise ValueError(f"{batch} sequences of up to {longest} tokens are beyond what was planned for")
        return self._buckets[column][row]


def _batches(limit: int) -> Iterator[int]:
    """1, 2, 4, 8, 12, 16, 24, 32, 48, 64, ..., and the limit."""
    size = 1
    while size < limit:
        yield size
        if size >= 8 and size * 3 // 2 < limit:
            yield size * 3 // 2
        size *= 2
    yield limit


def contexts(limit: int) -> Iterator[int]:
    """512, 1024, 2048, ..., and the limit."""
    size = _FIRST_CONTEXT
    while size < limit:
        yield size
        size *= 2
    yield limit
