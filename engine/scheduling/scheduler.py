"""What runs in the next step: decoding rows first, then prefill chunks, then images, each within a token budget.

The order follows Sarathi-Serve (Agrawal et al. 2024): a step always takes every decoding sequence along and bounds the
prefill beside it, so that a long prompt does not stop the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.preprocess import ImageInput
from engine.scheduling.kv_cache import KVCache
from engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens [start, stop) of a sequence; the last chunk's logits give the next token."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == self.sequence.length


@dataclass(frozen=True, slots=True)
class StepPlan:
    decode: list[Sequence] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    images: list[ImageInput] = field(default_factory=list)  # distinct by key
    waiting: list[Sequence] = field(default_factory=list)  # for those images

    @property
    def sequences(self) -> list[Sequence]:
        """Everybody whose work is in this step."""
        return [*self.decode, *(chunk.sequence for chunk in self.prefill), *self.waiting]


class Scheduler:
    """Waiting and running sequences of one model. Used by the step loop's thread only."""

    def __init__(self, kv: KVCache, *, prefill_chunk: int) -> None:
        self.kv = kv
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by age
        self._chunk = prefill_chunk  # tokens; also the budget of a step for prefill and, separately, for images

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is and give its memory back."""
        self.kv.free(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> StepPlan:
        """Choose the next step's work; may set sequences back or admit waiting ones."""
        crowded = self._make_room()
        if not crowded:
            self._admit()
        plan = StepPlan(decode=[sequence for sequence in self.running if sequence.is_decoding])
        self._plan_prefill(plan)
        return plan

    def deliver(self, key: bytes, features: NDArray[np.float32]) -> None:
        """Hand an image's features to every sequence that shows the image."""
        for sequence in self:
            for index, image in enumerate(sequence.images):
                if image.key == key:
                    sequence.features[index] = features

    def _make_room(self) -> bool:
        """Let every decoding sequence grow by a token, oldest first, at the expense of the youngest running ones."""
        crowded = False
        for sequence in [sequence for sequence in self.running if sequence.is_decoding]:
            while sequence.row is not None and not self.kv.grow(sequence):
                self._set_back(self.running[-1])
                crowded = True
        return crowded

    def _set_back(self, sequence: Sequence) -> None:
        self.kv.free(sequence)
        sequence.set_back()
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _admit(self) -> None:
        while self.waiting and self.kv.admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
            self.running.sort(key=lambda sequence: sequence.number)

    def _plan_prefill(self, plan: StepPlan) -> None:
        tokens = image_tokens = 0
        keys: set[bytes] = set()
        for sequence in self.running:
            if sequence.is_decoding:
                continue
            missing = sequence.missing_images()
            for image in (sequence.images[index] for index in missing):
                if image.key not in keys and (not keys or image_tokens + image.tokens <= self._chunk):
                    keys.add(image.key)
                    image_tokens += image.tokens
                    plan.images.append(image)
                    if sequence not in plan.waiting:
                        plan.waiting.append(sequence)
            if not missing:
                stop = self._chunk_end(sequence)
                if not tokens or tokens + stop - sequence.computed <= self._chunk:
                    plan.prefill.append(PrefillChunk(sequence, sequence.computed, stop))
                    tokens += stop - sequence.computed

    def _chunk_end(self, sequence: Sequence) -> int:
        """Chunks end at multiples of the chunk size, whatever else runs: alone and batched compute the same pieces."""
        return min((sequence.computed // self._chunk + 1) * self._chunk, sequence.length)
