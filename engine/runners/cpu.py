"""A model on the CPU: one call for all decoding rows, one per prefill chunk, the vision tower on its own thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.preprocess import ImageInput
from engine.runners.shared_work import SharedWork
from engine.runtime import Decoder, Encoder
from engine.sampling import NO_TOKEN, constrain, sample
from engine.scheduling.scheduler import PrefillChunk, StepPlan
from engine.scheduling.sequence import Sequence
from engine.spec import ModelSpec
from engine.stats import ModelMemory, resident_bytes


class FinishedStep:
    """Implements `StepResult`."""

    def __init__(self, sequences: list[Sequence], tokens: list[int]) -> None:
        self.sequences = sequences
        self._tokens = tokens

    def tokens(self) -> list[int]:
        return self._tokens


class CpuRunner:
    """Implements `Runner`. The tower takes as long as many steps, and the decoder leaves cores free.

    `prefill_threads` of them compute prompts while the step's decode call runs.
    """

    lag = 0

    def __init__(
        self,
        spec: ModelSpec,
        decoder: Decoder,
        encoder: Encoder | None,
        *,
        prefill_threads: int,
        weight_bytes: int,
        kv_bytes: int,
    ) -> None:
        self._spec = spec
        self.decoder = decoder
        self.tower = encoder
        self._eos = [token for token in spec.tokens.eos if token < spec.decoder.vocab]
        self._weight_bytes = weight_bytes
        self._kv_bytes = kv_bytes
        self._encoding = ThreadPoolExecutor(1, "engine-encode")
        self._prefilling = ThreadPoolExecutor(max(1, prefill_threads), "engine-prefill")
        self._prefill_threads = prefill_threads

    def launch(self, plan: StepPlan) -> FinishedStep:
        sampled = plan.sampled
        logits = self._logits(plan)
        tokens = self._sample(logits, sampled)
        plan.advance(sampled)
        return FinishedStep(sampled, tokens)

    def encode(self, images: list[ImageInput]) -> Future[list[Any]]:
        assert self.tower is not None, "This is a bug: images were accepted for a text-only model."
        return self._encoding.submit(self.tower.encode, images)

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
        self._encoding.shutdown(cancel_futures=True)
        self._prefilling.shutdown()

    def _logits(self, plan: StepPlan) -> list[NDArray[np.float32]]:
        """[B, vocab] of the decoding sequences that get a token now, then [1 or 0, vocab] of each chunk."""
        prefill = SharedWork(self._prefill, plan.prefill)
        for chunk in plan.prefill:
            assert chunk.sequence.row is not None
            self.decoder.announce(chunk.sequence.row, chunk.stop)
        idle = min(self._prefill_threads, len(plan.prefill) - (not plan.decode))
        helpers = [self._prefilling.submit(prefill.run) for _ in range(idle)]
        try:
            decoded = [self._decode(plan.decode)] if plan.decode else []
            prefill.run()
        finally:
            problems = [helper.exception() for helper in helpers]  # they write to rows, which a failed step gives back
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
        return tokens

    def _prefill(self, chunk: PrefillChunk) -> NDArray[np.float32]:
        """Logits [1, vocab] of the chunk's last token, or [0, vocab] of one that gives none."""
        sequence, start, stop = chunk.sequence, chunk.start, chunk.stop
        assert sequence.row is not None
        features = [sequence.features[number] for number in chunk.images]
        return self.decoder.prefill(
            sequence.row,
            start,
            sequence.tokens(start, stop),
            sequence.positions(start, stop),
            np.concatenate(features) if features else np.empty((0, self._spec.decoder.feature_width), np.float32),
            chunk.feature_index(),
            logits=chunk.gives_token,
        )

    def _decode(self, sequences: list[Sequence]) -> NDArray[np.float32]:
        """Logits [R, vocab] of the sequences whose newest token is the last that is known."""
        lengths = np.array([sequence.computed for sequence in sequences], np.int64)
        positions = lengths + np.array([sequence.prompt.position_delta for sequence in sequences], np.int64)
        logits = self.decoder.decode(
            [sequence.row for sequence in sequences if sequence.row is not None],
            np.array([sequence.next_token for sequence in sequences], np.int64),
            np.broadcast_to(positions, (self._spec.decoder.rope.axes, len(sequences))),
            lengths,
        )
        current = [row for row, sequence in enumerate(sequences) if sequence.computed + 1 == sequence.length]
        return logits if len(current) == len(logits) else logits[current]
