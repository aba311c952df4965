"""A model on the CPU: one call for all decoding rows, one per prefill chunk, the vision tower on its own thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.preprocess import ImageInput
from engine.runtime import Decoder, Encoder
from engine.sampling import NO_TOKEN, sample
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
    """Implements `Runner`. The tower takes as long as many steps, and the decoder leaves cores free."""

    lag = 0

    def __init__(
        self, spec: ModelSpec, decoder: Decoder, encoder: Encoder | None, *, weight_bytes: int, kv_bytes: int
    ) -> None:
        self._spec = spec
        self.decoder = decoder
        self.tower = encoder
        self._eos = [token for token in spec.tokens.eos if token < spec.decoder.vocab]
        self._weight_bytes = weight_bytes
        self._kv_bytes = kv_bytes
        self._encoding = ThreadPoolExecutor(1, "engine-encode")

    def launch(self, plan: StepPlan) -> FinishedStep:
        sampled = plan.sampled
        logits: list[NDArray[np.float32]] = []
        if plan.decode:
            decoded = self._decode(plan.decode)
            current = [row for row, sequence in enumerate(plan.decode) if sequence.computed + 1 == sequence.length]
            logits.append(decoded if len(current) == len(decoded) else decoded[current])
        logits += [self._prefill(chunk) for chunk in plan.prefill]
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

    def _sample(self, logits: list[NDArray[np.float32]], sequences: list[Sequence]) -> list[int]:
        if not sequences:
            return []
        stacked = logits[0] if len(logits) == 1 else np.concatenate(logits)
        if endless := [row for row, sequence in enumerate(sequences) if sequence.sampler.params.ignore_eos]:
            for token in self._eos:
                stacked[endless, token] = -np.inf
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
            np.concatenate(features) if features else np.empty((0, self._spec.decoder.hidden), np.float32),
            chunk.feature_index(),
            logits=chunk.gives_token,
        )

    def _decode(self, sequences: list[Sequence]) -> NDArray[np.float32]:
        """Logits [B, vocab] of each sequence's next token."""
        lengths = np.array([sequence.computed for sequence in sequences], np.int64)
        positions = lengths + np.array([sequence.prompt.position_delta for sequence in sequences], np.int64)
        return self.decoder.decode(
            [sequence.row for sequence in sequences if sequence.row is not None],
            np.array([sequence.next_token for sequence in sequences], np.int64),
            np.broadcast_to(positions, (self._spec.decoder.rope.axes, len(sequences))),
            lengths,
        )
