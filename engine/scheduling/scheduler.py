"""What runs next: decoding rows first, then prefill chunks within a token budget; images beside the steps.

The order follows Sarathi-Serve (Agrawal et al. 2024): a step always takes every decoding sequence along and bounds the
prefill beside it, so that a long prompt does not stop the others. The encoder has a batch of images and the next one,
which is whatever had gathered by then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.preprocess import ImageInput
from engine.scheduling.sequence import Sequence

ENCODER_BATCHES = 2  # one that is computed and one that is ready, so that the encoder need not wait for a step's end


class KV(Protocol):
    """Who may use how much KV memory: `KVCache` on a CPU, `PagedKVCache` on a device."""

    @property
    def blocks(self) -> int: ...

    @property
    def capacity(self) -> int:
        """Tokens in all blocks."""
        ...

    @property
    def used_blocks(self) -> int: ...

    @property
    def indexed_blocks(self) -> int: ...

    @property
    def survives_failures(self) -> bool:
        """Whether what sequences have is what it was, when a step of theirs failed somewhere on its way."""
        ...

    def admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its row and blocks for all its tokens and the next, and say what prefill is left."""
        ...

    def grow(self, sequence: Sequence) -> bool:
        """Make room for the token after the newest one; False when no block is left."""
        ...

    def spare(self, sequence: Sequence) -> int:
        """How many more tokens it can have beside the next before it must grow."""
        ...

    def free(self, sequence: Sequence) -> None:
        """Take row and blocks back; harmless for a sequence that has none."""
        ...

    def store(self, sequence: Sequence) -> None:
        """Make what is computed so far findable for later prompts that begin alike."""
        ...


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one step may take on.

    `prefill_tokens` is the budget of prefill. With `aligned_chunks` chunks end at multiples of it, whatever else runs,
    so that alone and batched compute the same pieces; without, they fill the budget, and all chunks of a step go into
    one call, which has either whole images or text. `image_tokens` bounds one encoder batch: the images of a large one
    wait for each other.
    """

    prefill_tokens: int
    image_tokens: int
    aligned_chunks: bool


@dataclass(frozen=True, slots=True, eq=False)
class PrefillChunk:
    """Tokens [start, stop) of a sequence; `gives_token`: the logits of the last one choose the next token."""

    sequence: Sequence
    start: int
    stop: int
    gives_token: bool

    @property
    def is_whole_image(self) -> bool:
        """The tokens see each other in both directions: `Prompt.whole_images`."""
        return self.sequence.prompt.whole_images and bool(self.images)

    @property
    def images(self) -> list[int]:
        """Numbers of the images that the chunk touches; the features of others may not be computed at all."""
        spans = enumerate(self.sequence.prompt.image_spans)
        return [number for number, span in spans if span.start < self.stop and span.stop > self.start]

    def feature_index(self, first: int = 0) -> NDArray[np.int64]:
        """[tokens]: the row of each token in the features of `images`, counted from `first`; -1 for text."""
        index = self.sequence.prompt.feature_index[self.start : self.stop]
        index = np.pad(index, (0, self.stop - self.start - len(index)), constant_values=-1)
        before = sum(image.tokens for image in self.sequence.images[: self.images[0]]) if self.images else 0
        return np.where(index >= 0, index - before + first, -1)


@dataclass(frozen=True, slots=True)
class StepPlan:
    decode: list[Sequence] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    images: list[ImageInput] = field(default_factory=list)  # distinct by key

    @property
    def sequences(self) -> list[Sequence]:
        """Everybody who gets further by this step."""
        return [*self.decode, *(chunk.sequence for chunk in self.prefill)]

    @property
    def sampled(self) -> list[Sequence]:
        """Whose next token this step chooses: the rest have more that is known already to compute."""
        decoding = [sequence for sequence in self.decode if sequence.computed + 1 == sequence.length]
        return decoding + [chunk.sequence for chunk in self.prefill if chunk.gives_token]

    def advance(self, sampled: list[Sequence]) -> None:
        """The step is under way: count as computed what it computes, and a token of each of `sampled` as pending."""
        for sequence in sampled:
            sequence.pending += 1
        for sequence in self.decode:
            sequence.computed += 1
        for chunk in self.prefill:
            chunk.sequence.computed = chunk.stop


class Scheduler:
    """Waiting and running sequences of one model. Used by the step loop's thread only."""

    def __init__(self, kv: KV, limits: StepLimits) -> None:
        self.kv = kv
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by age
        self._limits = limits
        self._encoding: set[bytes] = set()  # keys of the images that are with the encoder
        self._batches = 0  # that they went there in
        self._most: int | None = None  # that may run, since the device could not hold a step of more
        self._plan = StepPlan()  # the last one
        self._repeats = 0  # how many further steps do the same if nobody comes or goes

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self._repeats = 0

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is and give its memory back."""
        self.kv.free(sequence)
        sequence.ended = True
        self._repeats = 0
        if sequence in self.running:
            self.running.remove(sequence)
            self._most = None
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> StepPlan:
        """Choose the next step's work; may set sequences back or admit waiting ones.

        The last plan again, the object itself, means the same for the same sequences, each a token further.
        """
        if self._repeats:
            self._repeats -= 1
            return self._plan
        decoding, crowded = self._make_room()
        if not crowded:
            self._admit()
        plan = StepPlan(decode=decoding)
        prefilling = [sequence for sequence in self.running if sequence.is_prefilling]
        self._plan_prefill(plan, prefilling)
        if prefilling and self._batches < ENCODER_BATCHES:
            self._plan_images(plan, prefilling)
        self._plan, self._repeats = plan, self._repetitions(plan)
        return plan

    def _repetitions(self, plan: StepPlan) -> int:
        """Of a plan in which all that run decode: until somebody has all its tokens or needs a block."""
        if self.waiting or not len(plan.sampled) == len(plan.decode) == len(self.running) > 0:
            return 0
        spare = min([self.kv.spare(sequence) for sequence in plan.decode])
        return min(spare, min([one.max_tokens - len(one.output) - one.pending for one in plan.decode]) - 1)

    def deliver(self, features: Mapping[bytes, Any]) -> None:
        """Hand the images' features, by key, to every sequence that shows them; the encoder is free again."""
        self._leave_encoder(features)
        for sequence in self:
            for index, image in enumerate(sequence.images):
                if image.key in features:
                    sequence.features[index] = features[image.key]

    def give_up_images(self, keys: Collection[bytes]) -> list[Sequence]:
        """The encoder failed on a batch: the sequences that wait for its images."""
        self._leave_encoder(keys)
        return [sequence for sequence in self if any(image.key in keys for image in sequence.images)]

    def _leave_encoder(self, keys: Collection[bytes]) -> None:
        self._encoding.difference_update(keys)
        self._batches -= 1
        self._repeats = 0

    def relieve(self, plan: StepPlan) -> bool:
        """The device could not hold what a step needs: set back its younger half. False for a step of one sequence.

        No more are admitted before one of those that still run has ended, or the same would happen again. Where the
        step may have damaged what its sequences have, the older half begins again as well.
        """
        by_age = sorted(plan.sequences, key=lambda sequence: sequence.number)
        older = by_age[: (len(by_age) + 1) // 2]
        if len(older) == len(by_age):
            return False
        self._most = len(self.running) - (len(by_age) - len(older))
        lost = by_age if not self.kv.survives_failures else []
        for sequence in lost:
            sequence.computed = 0  # nothing of it is to be found again
        for sequence in reversed(lost or by_age[len(older) :]):
            self._set_back(sequence)
        return True

    def _make_room(self) -> tuple[list[Sequence], bool]:
        """Let every decoding sequence grow by a token, oldest first, at the expense of the youngest running ones.

        Those that decode, and whether some were set back.
        """
        decoding = [sequence for sequence in self.running if sequence.is_decoding]
        crowded = False
        for sequence in decoding:
            while sequence.row is not None and not self.kv.grow(sequence):
                self._set_back(self.running[-1])
                crowded = True
        return [sequence for sequence in decoding if sequence.row is not None] if crowded else decoding, crowded

    def _set_back(self, sequence: Sequence) -> None:
        self.kv.free(sequence)
        sequence.set_back()
        self._repeats = 0
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _admit(self) -> None:
        while self.waiting and not self.waiting[0].pending:
            if self._most is not None and len(self.running) >= self._most:
                return
            if not self.kv.admit(self.waiting[0]):
                return
            sequence = self.waiting.popleft()
            sequence.admitted_at = sequence.admitted_at or time.monotonic()
            self.running.append(sequence)
            self.running.sort(key=lambda sequence: sequence.number)

    def _plan_prefill(self, plan: StepPlan, prefilling: list[Sequence]) -> None:
        """Chunks by age while the budget lasts; at least one."""
        budget = self._limits.prefill_tokens
        for sequence in prefilling:
            if sequence.pauses[:1] == (sequence.computed,):
                self.kv.store(sequence)
                sequence.pauses = sequence.pauses[1:]
            if sequence.missing_images():
                continue
            stop = self._chunk_end(sequence, budget)
            tokens = stop - sequence.computed
            chunk = PrefillChunk(sequence, sequence.computed, stop, stop == sequence.length)
            if tokens and (tokens <= budget or not plan.prefill) and self._goes_with(chunk, plan.prefill):
                plan.prefill.append(chunk)
                budget -= tokens

    def _goes_with(self, chunk: PrefillChunk, others: list[PrefillChunk]) -> bool:
        apart = self._limits.aligned_chunks  # each chunk has a call of its own
        return apart or not others or others[0].is_whole_image == chunk.is_whole_image

    def _plan_images(self, plan: StepPlan, prefilling: list[Sequence]) -> None:
        """Images by the age of who waits for them, up to the limit; at least one."""
        chosen: dict[bytes, ImageInput] = {}
        tokens = 0
        for sequence in prefilling:
            for image in (sequence.images[index] for index in sequence.missing_images()):
                if image.key in chosen or image.key in self._encoding:
                    continue
                if not chosen or tokens + image.tokens <= self._limits.image_tokens:
                    chosen[image.key] = image
                    tokens += image.tokens
        plan.images.extend(chosen.values())
        self._encoding.update(chosen)
        self._batches += bool(chosen)

    def _chunk_end(self, sequence: Sequence, budget: int) -> int:
        size = self._limits.prefill_tokens
        stop = (sequence.computed // size + 1) * size if self._limits.aligned_chunks else sequence.computed + budget
        stop = sequence.prompt.piece_end(sequence.computed, stop) if stop > sequence.computed else stop
        return min(stop, sequence.prefill_end, *sequence.pauses[:1])
