"""The step loop: one thread runs the decoders; beside it one more runs the vision towers."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from engine.errors import Cancelled, EngineError, EngineStopped
from engine.job import Job
from engine.model import Model
from engine.preprocess import ImageInput
from engine.sampling import NO_TOKEN, sample
from engine.scheduling.scheduler import PrefillChunk, StepPlan
from engine.scheduling.sequence import Sequence

logger = logging.getLogger(__name__)
IDLE_WAIT_S = 0.2  # how late an expired request may be noticed while nothing runs


class StepLoop:
    """Takes in sequences, steps every model that has work, drops what nobody waits for any more.

    On a CPU the tower runs on a thread of its own: it takes as long as many steps, and the decoder leaves cores free.
    `housekeeping` is called between steps, at least every IDLE_WAIT_S. `on_features` gets each image's key and features
    once they are computed.
    """

    def __init__(
        self, *, housekeeping: Callable[[], None], on_features: Callable[[Model, bytes, NDArray[np.float32]], None]
    ) -> None:
        self._housekeeping = housekeeping
        self._on_features = on_features
        self._inbox: deque[tuple[Model, Sequence]] = deque()
        self._encoded: deque[tuple[Model, list[ImageInput], Future[list[NDArray[np.float32]]]]] = deque()
        self._encoder = ThreadPoolExecutor(1, "engine-encode")
        self._models: list[Model] = []
        self._awake = threading.Condition()
        self._streams_ended = False  # since the last look for abandoned jobs
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)
        self._thread.start()

    def add(self, model: Model, sequence: Sequence) -> None:
        """From any thread."""
        with self._awake:
            if self._closing:
                raise EngineStopped("the engine is shutting down")
            self._inbox.append((model, sequence))
            self._awake.notify()

    def on_stream_end(self) -> None:
        """A stream ended, perhaps the last one of its job. From any thread."""
        with self._awake:
            self._streams_ended = True
            self._awake.notify()

    def close(self) -> None:
        """Fail what is open and end the thread."""
        with self._awake:
            self._closing = True
            self._awake.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            self._take_in()
            self._drop_abandoned()
            self._housekeeping()
            worked = [self._step(model) for model in self._models]
            if not any(worked):
                with self._awake:
                    if not (self._inbox or self._encoded or self._closing):
                        self._awake.wait(IDLE_WAIT_S)
        self._encoder.shutdown(cancel_futures=True)
        self._take_in()
        for model in self._models:
            self._fail(model, list(model.scheduler), EngineStopped("the engine is shutting down"))

    def _take_in(self) -> None:
        with self._awake:
            arrived, self._inbox = self._inbox, deque()
            self._streams_ended |= bool(arrived)  # those of the new ones may have ended already
        for model, sequence in arrived:
            if model not in self._models:
                self._models.append(model)
            model.scheduler.add(sequence)
        while self._encoded:
            self._take_features(*self._encoded.popleft())

    def _drop_abandoned(self) -> None:
        if not self._streams_ended:
            return
        self._streams_ended = False
        for model in self._models:
            abandoned = [sequence for sequence in model.scheduler if _job(sequence).is_abandoned]
            self._fail(model, abandoned, Cancelled("nobody waits for this request any more"))

    def _step(self, model: Model) -> bool:
        """Schedule, run, sample, commit. True when there was work."""
        affected = list(model.scheduler)
        try:
            plan = model.scheduler.schedule()
            affected = plan.sequences
            self._encode(model, plan.images)
            sampled, logits = self._forward(model, plan)
            tokens = sample(logits, [sequence.sampler for sequence in sampled])
        except Exception as error:
            # Whatever a step dies of ends its sequences, never the loop.
            logger.exception("a step of model %s failed", model.name)
            self._fail(model, affected, EngineError(f"running the model failed: {error}"))
            return True
        for sequence, token in zip(sampled, tokens.tolist(), strict=True):
            try:
                self._commit(model, sequence, token)
            except Exception as error:  # text, stop words, caches: one request's own, so only that one ends
                logger.exception("a token of model %s could not be delivered", model.name)
                self._fail(model, [sequence], EngineError(f"continuing the answer failed: {error}"))
        return bool(affected)

    def _encode(self, model: Model, images: list[ImageInput]) -> None:
        """Start the tower on a batch; the result comes back through the inbox."""
        if not images:
            return
        assert model.encoder is not None, "This is a bug: images were accepted for a text-only model."
        future = self._encoder.submit(model.encoder.encode, images)
        future.add_done_callback(lambda done: self._on_encoded(model, images, done))

    def _on_encoded(self, model: Model, images: list[ImageInput], done: Future[list[NDArray[np.float32]]]) -> None:
        with self._awake:
            self._encoded.append((model, images, done))
            self._awake.notify()

    def _take_features(self, model: Model, images: list[ImageInput], done: Future[list[NDArray[np.float32]]]) -> None:
        if done.cancelled():
            return
        if error := done.exception():
            logger.error("encoding images for model %s failed", model.name, exc_info=error)
            self._fail(model, model.scheduler.give_up_images(), EngineError(f"encoding the image failed: {error}"))
            return
        features = {image.key: array for image, array in zip(images, done.result(), strict=True)}
        model.scheduler.deliver(features)
        for key, array in features.items():
            self._on_features(model, key, array)

    def _forward(self, model: Model, plan: StepPlan) -> tuple[list[Sequence], NDArray[np.float32]]:
        """Run all chunks and decoding rows; the sequences that get a token and their logits [n, vocab]."""
        sampled: list[Sequence] = []
        logits: list[NDArray[np.float32]] = [np.empty((0, model.artifact.spec.decoder.vocab), np.float32)]
        for chunk in plan.prefill:
            logits.append(_prefill(model, chunk))
            sampled += [chunk.sequence] * chunk.gives_token
        if plan.decode:
            decoded = _decode(model, plan.decode)
            current = [row for row, sequence in enumerate(plan.decode) if sequence.wants_token]
            logits.append(decoded[current])
            sampled += [plan.decode[row] for row in current]
        stacked = np.concatenate(logits)
        if endless := [row for row, sequence in enumerate(sampled) if _job(sequence).sampling.ignore_eos]:
            spec = model.artifact.spec
            eos = [token for token in spec.tokens.eos if token < spec.decoder.vocab]
            stacked[np.ix_(endless, eos)] = -np.inf
        return sampled, stacked

    def _commit(self, model: Model, sequence: Sequence, token: int) -> None:
        if token == NO_TOKEN:
            self._fail(model, [sequence], EngineError("the model's output is not a number; its weights may be damaged"))
            return
        if not sequence.output:
            model.scheduler.kv.store(sequence)
        sequence.sampler.commit(token)
        sequence.output.append(token)
        if _job(sequence).token(token, count=len(sequence.output), reused=sequence.reused):
            model.scheduler.remove(sequence)

    def _fail(self, model: Model, sequences: list[Sequence], error: EngineError) -> None:
        for sequence in sequences:
            model.scheduler.remove(sequence)
            _job(sequence).fail(error)


def _job(sequence: Sequence) -> Job:
    assert isinstance(sequence.owner, Job)
    return sequence.owner


def _prefill(model: Model, chunk: PrefillChunk) -> NDArray[np.float32]:
    sequence, prompt, start, stop = chunk.sequence, chunk.sequence.prompt, chunk.start, chunk.stop
    assert sequence.row is not None
    features, index = _chunk_features(model, chunk)
    logits = model.decoder.prefill(
        sequence.row,
        start,
        prompt.token_ids[start:stop],
        prompt.positions[:, start:stop],
        features,
        index,
        logits=chunk.gives_token,
    )
    sequence.computed = stop
    return logits


def _chunk_features(model: Model, chunk: PrefillChunk) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features [n, hidden] of the images that the chunk touches (the others may not be computed at all), and the row
    of each token in them, -1 for text."""
    sequence, start, stop = chunk.sequence, chunk.start, chunk.stop
    index = sequence.prompt.feature_index[start:stop]
    spans = sequence.prompt.image_spans
    touched = [number for number, span in enumerate(spans) if span.start < stop and span.stop > start]
    features = [array for number in touched if (array := sequence.features[number]) is not None]
    if not features:
        return np.empty((0, model.artifact.spec.decoder.hidden), np.float32), index
    before = sum(image.tokens for image in sequence.images[: touched[0]])
    return np.concatenate(features), np.where(index >= 0, index - before, -1)


def _decode(model: Model, sequences: list[Sequence]) -> NDArray[np.float32]:
    lengths = np.array([sequence.computed for sequence in sequences], np.int64)
    positions = lengths + np.array([sequence.prompt.position_delta for sequence in sequences], np.int64)
    logits = model.decoder.decode(
        [sequence.row for sequence in sequences if sequence.row is not None],
        np.array([sequence.next_token for sequence in sequences], np.int64),
        np.broadcast_to(positions, (model.artifact.spec.decoder.rope.axes, len(sequences))),
        lengths,
    )
    for sequence in sequences:
        sequence.computed += 1
    return logits
