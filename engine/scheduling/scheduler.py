"""What runs next: decoding rows first, then prefill chunks within a token budget; images beside the steps.

The order follows Sarathi-Serve (Agrawal et al. 2024): a step always takes every decoding sequence along and bounds the
prefill beside it, so that a long prompt does not stop the others. One batch of images is with the encoder at a time,
and the next one is whatever has gathered meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.preprocess import ImageInput
from engine.scheduling.kv_cache import KVCache
from engine.scheduling.sequence import Sequence

IMAGE_TOKENS = 64  # of one encoder batch: on a CPU a larger one only keeps the first image waiting for the last


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens [start, stop) of a sequence's prompt; the last chunk's logits give the first output token."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def gives_token(self) -> bool:
        return self.stop == self.sequence.length


@dataclass(frozen=True, slots=True)
class StepPlan:
    decode: list[Sequence] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    images: list[ImageInput] = field(default_factory=list)  # distinct by key

    @property
    def sequences(self) -> list[Sequence]:
        """Everybody who gets further by this step."""
        return [*self.decode, *(chunk.sequence for chunk in self.prefill)]


class Scheduler:
    """Waiting and running sequences of one model. Used by the step loop's thread only."""

    def __init__(self, kv: KVCache, *, prefill_chunk: int) -> None:
        self.kv = kv
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by age
        self._chunk = prefill_chunk  # tokens; also a step's budget
        self._encoding: frozenset[bytes] = frozenset()  # keys of the images that are with the encoder

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
        if not self._encoding:
            self._plan_images(plan)
        return plan

    def deliver(self, features: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Hand the images' features, by key, to every sequence that shows them; the encoder is free again."""
        self._encoding = frozenset()
        for sequence in self:
            for index, image in enumerate(sequence.images):
                if image.key in features:
                    sequence.features[index] = features[image.key]

    def give_up_images(self) -> list[Sequence]:
        """The encoder failed: the sequences that wait for the images it had."""
        keys, self._encoding = self._encoding, frozenset()
        return [sequence for sequence in self if any(image.key in keys for image in sequence.images)]

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
        """Chunks by age while the budget lasts; at least one."""
        tokens = 0
        for sequence in self.running:
            if sequence.is_decoding or sequence.missing_images():
                continue
            stop = self._chunk_end(sequence)
            if not tokens or tokens + stop - sequence.computed <= self._chunk:
                plan.prefill.append(PrefillChunk(sequence, sequence.computed, stop))
                tokens += stop - sequence.computed

    def _plan_images(self, plan: StepPlan) -> None:
        """Images by the age of who waits for them, up to IMAGE_TOKENS; at least one."""
        chosen: dict[bytes, ImageInput] = {}
        tokens = 0
        for sequence in self.running:
            for image in (sequence.images[index] for index in sequence.missing_images()):
                if image.key not in chosen and (not chosen or tokens + image.tokens <= IMAGE_TOKENS):
                    chosen[image.key] = image
                    tokens += image.tokens
        plan.images.extend(chosen.values())
        self._encoding = frozenset(chosen)

    def _chunk_end(self, sequence: Sequence) -> int:
        """Chunks end at multiples of the chunk size, whatever else runs: alone and batched compute the same pieces."""
        return min((sequence.computed // self._chunk + 1) * self._chunk, len(sequence.prompt.token_ids))
