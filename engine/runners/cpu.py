"""A model on the CPU: one call for all decoding rows, one per prefill chunk, the vision tower beside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.preprocess import ImageInput
from engine.runners.ordered_memory import OrderedMemory
from engine.runners.shared_work import SharedWork
from engine.runners.step_thread import StepThread, Turn
from engine.runtime import Decoder, Encoder
from engine.sampling import NO_TOKEN, constrain, sample
from engine.scheduling.kv_cache import KVMemory
from engine.scheduling.scheduler import PrefillChunk, StepPlan
from engine.scheduling.sequence import Sequence
from engine.spec import ModelSpec
from engine.stats import ModelMemory, resident_bytes

_PENDING = -1  # instead of a token that a step under way chooses


@dataclass(frozen=True, slots=True)
class _Decode:
    """The decoding sequences as they are when a step is launched: they go on while it waits for its turn."""

    rows: list[int]
    tokens: NDArray[np.int64]  # [B], or _PENDING
    lengths: NDArray[np.int64]  # [B]
    positions: NDArray[np.int64]  # [1, B], the same on all axes
    sampled: list[int] | None  # places of those that get a token, None for all


@dataclass(frozen=True, slots=True)
class _Prefill:
    chunk: PrefillChunk
    row: int


@dataclass(frozen=True, slots=True)
class _Step:
    decode: _Decode | None
    prefill: list[_Prefill]
    sampled: list[Sequence]
    rows: list[int]  # of the sampled ones
    changes: list[Turn[None]]  # of rows, before


class LaunchedStep:
    """Implements `StepResult`."""

    def __init__(self, sequences: list[Sequence], tokens: Turn[list[int]]) -> None:
        self.sequences = sequences
        self._tokens = tokens
        self.waited_s = 0.0

    def tokens(self) -> list[int]:
        waiting_s = time.perf_counter()
        tokens = self._tokens.result()
        self.waited_s = time.perf_counter() - waiting_s
        return tokens


class CpuRunner:
    """Implements `Runner`. The tower takes as long as many steps, and the decoder leaves cores free.

    `helpers` is how many: a thread for each takes batches of images, and prompts while the step's decode call runs.
    No more threads than that: one that computed prompts while the tower has its core would take turns with it and with
    the decoder, and all three would find cold caches. Where there are some, a step is launched before the last one's
    tokens are read, so that the step loop's code runs beside the model's. Where the decoder has all cores, the step too
    many that an answer's end costs would be dear; the tower has a thread all the same, because no step may wait for it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        decoder: Decoder,
        encoder: Encoder | None,
        *,
        helpers: int,
        weight_bytes: int,
        kv_bytes: int,
    ) -> None:
        self._spec = spec
        self.decoder = decoder
        self.tower = encoder
        # Two, because a turn of the loop may wait for the interpreter or a core for longer than a step takes. States
        # are kept where a chunk ends, which the next step would go past.
        self.lag = 2 if helpers and spec.decoder.delta_net is None else 0
        self._eos = [token for token in spec.tokens.eos if token < spec.decoder.vocab]
        self._weight_bytes = weight_bytes
        self._kv_bytes = kv_bytes
        self._stepping = StepThread("engine-decode")
        self._beside = ThreadPoolExecutor(max(1, helpers), "engine-beside")
        self._helpers = helpers
        self._memory = OrderedMemory(decoder, self._stepping)
        self._newest = np.zeros(decoder.rows, np.int64)  # token of each row; the stepping thread's

    @property
    def kv_memory(self) -> KVMemory:
        """The rows' memory for whoever gives them to sequences."""
        return self._memory

    def launch(self, plan: StepPlan) -> LaunchedStep:
        sampled = plan.sampled
        step = _Step(
            _decode(plan.decode, self._place) if plan.decode else None,
            [_Prefill(chunk, self._place(chunk.sequence)) for chunk in plan.prefill],
            sampled,
            [self._place(sequence) for sequence in sampled],
            self._memory.take_changes(),
        )
        plan.advance(sampled)
        return LaunchedStep(sampled, self._stepping.submit(partial(self._run, step)))

    def encode(self, images: list[ImageInput]) -> Future[list[Any]]:
        assert self.tower is not None, "This is a bug: images were accepted for a text-only model."
        return self._beside.submit(self.tower.encode, images)

    def host_features(self, features: NDArray[np.float32]) -> Callable[[], NDArray[np.floating]]:
        return lambda: features

    def memory(self) -> ModelMemory:
        return ModelMemory(
            weights=self._weight_bytes,
            kv=self._kv_bytes,
            kv_per_token=self._spec.decoder.kv_bytes_per_token,
            workspace=0,
            host=resident_bytes(),
        )

    def close(self) -> None:
        self._stepping.close()
        self._beside.shutdown(cancel_futures=True)

    def _place(self, sequence: Sequence) -> int:
        assert sequence.row is not None, "This is a bug: a waiting sequence is in no step."
        return self._memory.place(sequence.row)

    def _run(self, step: _Step) -> list[int]:
        for change in step.changes:
            change.result()
        tokens = self._sample(self._logits(step), step.sampled)
        if tokens:
            self._newest[step.rows] = [max(0, token) for token in tokens]  # one without a token is about to fail
        return tokens

    def _logits(self, step: _Step) -> list[NDArray[np.float32]]:
        """[B, vocab] of the decoding sequences that get a token now, then [1 or 0, vocab] of each chunk."""
        prefill = SharedWork(self._prefill, step.prefill)
        for part in step.prefill:
            self.decoder.announce(part.row, part.chunk.stop)
        wanted = min(self._helpers, len(step.prefill) - (step.decode is None))
        helpers = [self._beside.submit(prefill.run) for _ in range(wanted)]
        try:
            decoded = [self._decode(step.decode)] if step.decode is not None else []
            prefill.run()
        finally:
            begun = [helper for helper in helpers if not helper.cancel()]  # the tower may have had all of them
            problems = [helper.exception() for helper in begun]  # they write to rows, which a failed step gives back
        for problem in filter(None, problems):
            raise problem
        return decoded + prefill.results

    def _sample(self, logits: list[NDArray[np.float32]], sequences: list[Sequence]) -> list[int]:
        if not sequences:
            return []
        stacked = logits[0] if len(logits) == 1 else np.concatenate(logits)
        if endless := [row for row, sequence in enumerate(sequences) if sequence.sampler.params.ignore_eos]:
            starts = np.array(endless) * stacked.shape[1]
            for token in self._eos:
                stacked.reshape(-1)[starts + token] = -np.inf
        if matchers := {row: one.sampler.grammar for row, one in enumerate(sequences) if one.sampler.grammar}:
            constrain(stacked, matchers)
        tokens: list[int] = sample(stacked, [sequence.sampler for sequence in sequences]).tolist()
        for sequence, token in zip(sequences, tokens, strict=True):
            if token != NO_TOKEN:
                sequence.sampler.commit(token)
            elif sequence.sampler.grammar is not None:
                sequence.sampler.grammar.find_problem()
        return tokens

    def _prefill(self, part: _Prefill) -> NDArray[np.float32]:
        """Logits [1, vocab] of the chunk's last token, or [0, vocab] of one that gives none."""
        chunk = part.chunk
        sequence, start, stop = chunk.sequence, chunk.start, chunk.stop
        features = [sequence.features[number] for number in chunk.images]
        return self.decoder.prefill(
            part.row,
            start,
            sequence.tokens(start, stop),
            sequence.positions(start, stop),
            np.concatenate(features) if features else np.empty((0, self._spec.decoder.feature_width), np.float32),
            chunk.feature_index(),
            logits=chunk.gives_token,
        )

    def _decode(self, decode: _Decode) -> NDArray[np.float32]:
        """Logits [R, vocab] of the sequences whose newest token is the last that is known."""
        tokens = np.where(decode.tokens == _PENDING, self._newest[decode.rows], decode.tokens)
        logits = self.decoder.decode(decode.rows, tokens, decode.positions, decode.lengths)
        return logits if decode.sampled is None else logits[decode.sampled]


def _decode(sequences: list[Sequence], place: Callable[[Sequence], int]) -> _Decode:
    table = np.array(
        [(place(one), one.next_token(_PENDING), one.computed, one.prompt.position_delta) for one in sequences], np.int64
    )
    rows, tokens, lengths, deltas = table.T
    sampled = [index for index, one in enumerate(sequences) if one.computed + 1 == one.length]
    return _Decode(
        rows.tolist(), tokens, lengths, (lengths + deltas)[None], None if len(sampled) == len(sequences) else sampled
    )
