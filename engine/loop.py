"""The step loop: one thread for each device, and nobody else touches that device."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.delivery import ChosenToken, Delivery
from engine.errors import Cancelled, DeviceLost, DeviceOutOfMemory, EngineError, EngineStopped
from engine.job import Job
from engine.preprocess import ImageInput
from engine.replica import Replica, UnderWay
from engine.sampling import NO_TOKEN
from engine.scheduling.scheduler import StepPlan
from engine.scheduling.sequence import Sequence
from engine.stats import OnStep, StepRecord

logger = logging.getLogger(__name__)

OnFeatures = Callable[[str, bytes, NDArray[np.floating]], None]
"""Called with `Replica.numerics`, the image's key and its features."""


class StepLoop:
    """Takes in sequences, steps every replica that has work, drops what nobody waits for any more.

    `on_features` gets each image's key and features once they are computed, `on_step` a record of each step. A device
    that runs on while the host works gets its next step before the tokens of the last are read.
    """

    def __init__(
        self,
        device: str,
        *,
        on_features: OnFeatures | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.device = device
        self._on_features = on_features
        self._on_step = on_step
        self._inbox: deque[tuple[Replica, Sequence]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._encoded: deque[tuple[Replica, list[ImageInput], Future[list[Any]]]] = deque()
        self._replicas: list[Replica] = []
        self._awake = threading.Condition()
        self._streams_ended = False  # since the last look for abandoned jobs
        self._closing = False
        self._delivery = Delivery(f"engine-deliver-{device}")
        self._thread = threading.Thread(target=self._run, name=f"engine-step-{device}", daemon=True)
        self._thread.start()

    def add(self, replica: Replica, sequence: Sequence) -> None:
        """From any thread."""
        with self._awake:
            if self._closing:
                raise EngineStopped("the engine is shutting down")
            replica.load += 1
            self._inbox.append((replica, sequence))
            self._awake.notify()

    def call[T](self, function: Callable[[], T]) -> Future[T]:
        """Run something on the device's thread, between steps. From any other thread."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001  whatever it is belongs to the caller
                future.set_exception(error)

        with self._awake:
            if self._closing:
                raise EngineStopped("the engine is shutting down")
            self._calls.append(run)
            self._awake.notify()
        return future

    def remove(self, replica: Replica) -> Future[None]:
        """Give up a replica and its memory; requests that came in meanwhile fail."""
        return self.call(partial(self._close_replica, replica))

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
            worked = [self._step(replica) for replica in self._replicas]
            if not any(worked):
                with self._awake:
                    if not (self._inbox or self._calls or self._encoded or self._streams_ended or self._closing):
                        self._awake.wait()
        self._take_in()
        for replica in list(self._replicas):
            self._close_replica(replica)
        self._delivery.close()

    def _take_in(self) -> None:
        with self._awake:
            calls, self._calls = self._calls, deque()
            arrived, self._inbox = self._inbox, deque()
        for call in calls:
            call()
        for replica, sequence in arrived:
            if replica not in self._replicas:
                self._replicas.append(replica)
            replica.scheduler.add(sequence)
            if _job(sequence).is_abandoned:  # since before it was here
                self._streams_ended = True
        while self._encoded:
            self._take_features(*self._encoded.popleft())

    def _drop_abandoned(self) -> None:
        if not self._streams_ended:
            return
        self._streams_ended = False
        for replica in self._replicas:
            abandoned = [sequence for sequence in replica.scheduler if _job(sequence).is_abandoned]
            self._fail(replica, abandoned, Cancelled("nobody waits for this request any more"))

    def _step(self, replica: Replica) -> bool:
        """Schedule and launch a step, then read the tokens of the oldest one under way. True when there was work."""
        started_s = time.perf_counter()
        plan = replica.scheduler.schedule()
        launched = self._launch(replica, plan, started_s)
        if len(replica.under_way) > (replica.runner.lag if launched else 0):
            self._finish(replica, replica.under_way.popleft(), started_s)
            return True
        return bool(plan.sequences or plan.images)

    def _launch(self, replica: Replica, plan: StepPlan, started_s: float) -> bool:
        """Whatever a step dies of ends its sequences, never the loop."""
        try:
            self._encode(replica, plan.images)
            if not plan.sequences:
                return False
            replica.under_way.append(UnderWay(plan, replica.runner.launch(plan), started_s))
            return True
        except DeviceOutOfMemory as error:
            logger.warning("a step of model %s on %s ran out of memory", replica.name, replica.device)
            if not replica.scheduler.relieve(plan):
                self._fail(replica, plan.sequences, error)
        except Exception as error:  # noqa: BLE001
            self._give_up(replica, plan, error)
        return False

    def _finish(self, replica: Replica, step: UnderWay, turn_s: float) -> None:
        """Read a step's tokens, and give them to their sequences and streams."""
        try:
            tokens = step.result.tokens()
        except Exception as error:  # noqa: BLE001
            self._give_up(replica, step.plan, error)
            return
        chosen = [
            self._commit(replica, sequence, token)
            for sequence, token in zip(step.result.sequences, tokens, strict=True)
            if not sequence.ended  # cancelled, or over by a stop word, since the step was launched
        ]
        self._delivery.tokens([one for one in chosen if one is not None])
        if self._on_step is not None:
            self._on_step(_record(replica, step, len(tokens), turn_s))

    def _commit(self, replica: Replica, sequence: Sequence, token: int) -> ChosenToken | None:
        sequence.pending -= 1
        if token == NO_TOKEN:
            self._discard(replica, [sequence], EngineError(_why_no_token(sequence)))
            return None
        sequence.output.append(token)
        job: Job = sequence.owner
        count = len(sequence.output)
        if count == 1:
            replica.scheduler.kv.store(sequence)
            job.on_admitted(sequence.admitted_at)
        is_last = count >= sequence.max_tokens or token in job.eos
        if is_last:
            self._remove(replica, sequence)
        return ChosenToken(job, token, sequence.reused, is_last or count == 1)

    def _encode(self, replica: Replica, images: list[ImageInput]) -> None:
        """Start the tower on a batch; the result comes back through the inbox."""
        if not images:
            return
        future = replica.runner.encode(images)
        future.add_done_callback(lambda done: self._on_encoded(replica, images, done))

    def _on_encoded(self, replica: Replica, images: list[ImageInput], done: Future[list[Any]]) -> None:
        with self._awake:
            self._encoded.append((replica, images, done))
            self._awake.notify()

    def _take_features(self, replica: Replica, images: list[ImageInput], done: Future[list[Any]]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if isinstance(error, DeviceLost):
            self._lose(error)
            return
        if error:
            logger.error("encoding images for model %s failed", replica.name, exc_info=error)
            failure = error if isinstance(error, EngineError) else EngineError(f"encoding the image failed: {error}")
            self._fail(replica, replica.scheduler.give_up_images([image.key for image in images]), failure)
            return
        features = {image.key: array for image, array in zip(images, done.result(), strict=True)}
        replica.scheduler.deliver(features)
        if self._on_features is not None:
            self._keep(replica, self._on_features, features)

    def _keep(self, replica: Replica, on_features: OnFeatures, features: dict[bytes, Any]) -> None:
        try:
            copies = {key: replica.runner.host_features(array) for key, array in features.items()}
        except Exception:
            logger.exception("features of images of model %s are not kept", replica.name)
            return
        for key, copy in copies.items():
            self._delivery.work(partial(_keep, on_features, replica.numerics, key, copy))

    def _give_up(self, replica: Replica, plan: StepPlan, error: Exception) -> None:
        """A step failed: its sequences end, and with a device that is lost all that it has."""
        if isinstance(error, DeviceLost):
            self._lose(error)
            return
        logger.error("a step of model %s failed", replica.name, exc_info=error)
        failure = error if isinstance(error, EngineError) else EngineError(f"running the model failed: {error}")
        self._discard(replica, plan.sequences, failure)

    def _lose(self, error: DeviceLost) -> None:
        logger.critical("%s is lost", self.device, exc_info=error)
        for replica in self._replicas:
            replica.under_way.clear()
            self._discard(replica, list(replica.scheduler), error)

    def _discard(self, replica: Replica, sequences: list[Sequence], error: EngineError) -> None:
        """Fail sequences of whose KV nothing may be found again: it may be damaged too."""
        for sequence in sequences:
            sequence.computed = 0
        self._fail(replica, sequences, error)

    def _fail(self, replica: Replica, sequences: list[Sequence], error: EngineError) -> None:
        for sequence in sequences:
            self._remove(replica, sequence)
            _job(sequence).fail(error)

    def _remove(self, replica: Replica, sequence: Sequence) -> None:
        if sequence.ended:
            return
        replica.scheduler.remove(sequence)
        with self._awake:
            replica.load -= 1

    def _close_replica(self, replica: Replica) -> None:
        self._fail(replica, list(replica.scheduler), EngineStopped("the engine is shutting down"))
        replica.under_way.clear()
        if replica in self._replicas:
            self._replicas.remove(replica)
        replica.runner.close()


def _job(sequence: Sequence) -> Job:
    assert isinstance(sequence.owner, Job)
    return sequence.owner


def _why_no_token(sequence: Sequence) -> str:
    grammar = sequence.sampler.grammar
    if grammar is not None and grammar.problem:
        return grammar.problem
    return "the model's output is not a number; its weights may be damaged"


def _keep(on_features: OnFeatures, numerics: str, key: bytes, copy: Callable[[], NDArray[np.floating]]) -> None:
    on_features(numerics, key, copy())


def _record(replica: Replica, step: UnderWay, tokens: int, turn_s: float) -> StepRecord:
    finished_s = time.perf_counter()
    plan = step.plan
    return StepRecord(
        model=replica.name,
        started_s=step.started_s,
        finished_s=finished_s,
        host_s=finished_s - turn_s - step.result.waited_s,
        decode_rows=len(plan.decode),
        context_tokens=sum([sequence.computed for sequence in plan.decode]),
        prefill_tokens=sum([chunk.stop - chunk.start for chunk in plan.prefill]),
        images=len(plan.images),
        tokens_out=tokens,
        device=replica.device,
    )
