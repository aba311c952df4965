"""The engine: submit a request, get a stream of events.

    submit -> prepare (worker thread: pixels, prompt, cache) -> step loop (schedule, run, sample, commit) -> events

A plain library: no Dify, no sockets, no gevent. Several threads may call it.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.cache import Answer, answer_key, feature_key, open_caches
from engine.catalog import known_models, model_name
from engine.config import EngineConfig
from engine.device import Devices, resolve
from engine.errors import (
    ContextOverflow,
    DeadlineExceeded,
    EngineError,
    EngineStopped,
    InvalidRequest,
    QueueFull,
)
from engine.fetch import ImageFetcher
from engine.hub.downloads import Downloads
from engine.job import Job
from engine.loop import StepLoop
from engine.model import Model, OpenCuda, load_model
from engine.prompts import Prompt
from engine.request import Chunk, Finished, Message, Request, Timings, Tool, shown
from engine.sampling import SamplerState
from engine.scheduling.sequence import Sequence
from engine.stats import Counts, OnStep, Uncounted, both
from engine.status import model_status
from engine.storage import open_storage
from engine.stream import OnEvent, Stream

if TYPE_CHECKING:
    from engine.metrics import MetricsServer

logger = logging.getLogger(__name__)
CLOCK_S = 0.2  # how late an expired request may be noticed


class Engine:
    """Raises StorageError when the storage folder cannot be used. `open_cuda` replaces how a GPU's replicas open."""

    def __init__(
        self, config: EngineConfig, *, on_step: OnStep | None = None, open_cuda: OpenCuda | None = None
    ) -> None:
        self.config = config
        self._open_cuda = open_cuda
        open_storage(config.storage)
        self._answers, self._features = open_caches(config)
        self._counts: Counts = Uncounted()
        self._on_step = on_step
        self._lock = threading.Lock()
        self._open: dict[Stream, str] = {}  # and the model each is for
        self._models: dict[str, Future[Model]] = {}
        self._last_used: dict[str, float] = {}
        self._devices = Devices()  # from the first load on
        self._loops: list[StepLoop] = []  # one for each of them
        self._jobs_lock = threading.Lock()
        self._jobs: dict[bytes, Job] = {}  # deterministic work under way, by answer key
        self._numbers = 0
        self._closing = False
        self._loader = ThreadPoolExecutor(1, "engine-load")
        workers = config.preparing_threads
        self._workers = ThreadPoolExecutor(workers, "engine-prepare")
        # Decoding a video takes seconds, for which requests without one do not wait.
        self._video_workers = ThreadPoolExecutor(workers, "engine-prepare-video")
        self._fetcher = ImageFetcher(config)
        self._downloads = Downloads(config)
        self._arrivals: dict[Stream, tuple[str, float]] = {}  # who waits for a download: for what, and how long
        self._stopped = threading.Event()
        self._clock = threading.Thread(target=self._run_clock, name="engine-clock", daemon=True)
        self._clock.start()
        self._metrics_server = self._serve_metrics(config.metrics_port) if config.metrics_port else None

    def _serve_metrics(self, port: int) -> MetricsServer:
        from engine.metrics import Metrics, MetricsServer  # Prometheus's client, which an engine without has no need of

        metrics = Metrics(self.status)
        self._counts, self._on_step = metrics, both(self._on_step, metrics.on_step)
        return MetricsServer(port, metrics.registry)

    def submit(self, request: Request, on_event: OnEvent | None = None) -> Stream:
        """Accept a request. Raises at once: InvalidRequest, UnknownModel, QueueFull, EngineStopped.

        Everything else that goes wrong ends the stream with the error.
        """
        try:
            return self._submit(request, on_event)
        except EngineError as error:
            self._counts.ended(request.model if request.model in self._models else "", error)
            raise

    def _submit(self, request: Request, on_event: OnEvent | None) -> Stream:
        if (images := len(request.shown) + len(request.urls)) > self.config.max_images:
            raise InvalidRequest(f"{images} images in one request; the limit is {self.config.max_images} (max_images)")
        is_here = self._downloads.require(request.model)
        accepted = time.monotonic()
        limit = self.config.request_timeout_s if request.timeout_s is None else request.timeout_s
        stream = Stream(on_event, deadline=accepted + min(limit, self.config.request_timeout_s), on_end=self._ended)
        with self._lock:
            if self._closing:
                raise EngineStopped("the engine is shutting down")
            if len(self._open) >= self.config.max_batch_size + self.config.max_waiting:
                raise QueueFull(
                    f"the queue is full ({self.config.max_waiting} waiting); try again or raise max_waiting"
                )
            self._open[stream] = model_name(request.model, self.config.storage)
            if not is_here:
                self._arrivals[stream] = request.model, accepted + self.config.download_wait_s
        pool, prepare = (self._fetcher.pool, self._fetch) if request.urls else (self._pool(request), self._prepare)
        start = partial(prepare, request, stream, accepted)
        self._model(request.model).add_done_callback(lambda model: pool.submit(start, model))
        return stream

    def count_tokens(self, model: str, messages: tuple[Message, ...], tools: tuple[Tool, ...] = ()) -> int:
        """Tokens of the prompt, images included. Blocks while the model loads. Raises ModelDownloading."""
        self._downloads.wait(model)
        messages = self._fetcher.fetched(messages)
        loaded = self.load(model)
        layouts = loaded.layouts(shown(messages), self.config.max_image_megapixels)
        return loaded.prompts.count(messages, layouts, tools)

    def load(self, name: str) -> Model:
        """Load a model now instead of at its first request; blocks, however long its download takes."""
        self._downloads.require(name)
        return self._model(name).result()

    def pull(self, name: str) -> dict[str, Any]:
        """Start the download of a model that is not there; returns at once.

        `state` is "here" or "downloading", `note` how far it is. Raises UnknownModel.
        """
        if self._downloads.require(name):
            return {"state": "here", "note": ""}
        self._downloads.start(name)
        return {"state": "downloading", "note": str(self._downloads.note(name))}

    def status(self) -> dict[str, Any]:
        """Plain values about what is loaded and under way."""
        with self._lock:
            futures = dict(self._models)
            waiting = len(self._open)
        loaded = {name: future for name, future in futures.items() if future.done() and not future.exception()}
        return {
            "open_requests": waiting,
            "known_models": sorted(known_models(self.config.storage)),
            "downloads": {name: str(self._downloads.progress(name)) for name in self._downloads.names()},
            "models": {name: model_status(future.result()) for name, future in loaded.items()},
        }

    def close(self) -> None:
        """Fail open requests, write out the caches, end all threads."""
        if self._metrics_server is not None:
            self._metrics_server.close()
        with self._lock:
            self._closing = True
            streams = list(self._open)
        for stream in streams:
            stream.push(EngineStopped("the engine is shutting down"))
        self._stopped.set()
        self._clock.join()
        self._downloads.close()
        self._loader.shutdown(cancel_futures=True)
        self._workers.shutdown(cancel_futures=True)
        self._video_workers.shutdown(cancel_futures=True)
        self._fetcher.close()
        for loop in self._loops:
            loop.close()
        for cache in (self._answers, self._features):
            if cache is not None:
                cache.close()

    def _model(self, name: str) -> Future[Model]:
        """The model, fetched and loaded once however many ask; what failed is tried again by the next request."""
        with self._lock:
            key = model_name(name, self.config.storage)
            future = self._models.get(key)
            if future is None or (future.done() and future.exception() is not None):
                future = self._models[key] = self._downloads.after(name, lambda: self._loader.submit(self._load, key))
            self._last_used[key] = time.monotonic()
            return future

    def _load(self, name: str) -> Model:
        """On the loader's thread, which is the only one that starts loops."""
        if not self._loops:
            self._devices = resolve(self.config)  # once: the first model leaves less free than a second look would want
            on_features = None if self._features is None else self._keep_features
            names = [f"cuda:{gpu.index}" for gpu in self._devices.gpus] or ["cpu"]
            self._loops = [StepLoop(name, on_features=on_features, on_step=self._on_step) for name in names]
        model = load_model(name, self.config, self._devices, self._loops, self._open_cuda)
        _leave_to_the_end()
        return model

    def _fetch(self, request: Request, stream: Stream, accepted: float, loaded: Future[Model]) -> None:
        with stream.failing():
            if not stream.has_ended:
                request = replace(request, messages=self._fetcher.fetched(request.messages))
                self._pool(request).submit(self._prepare, request, stream, accepted, loaded)

    def _pool(self, request: Request) -> ThreadPoolExecutor:
        return self._video_workers if request.has_videos else self._workers

    def _prepare(self, request: Request, stream: Stream, accepted: float, loaded: Future[Model]) -> None:
        with stream.failing():
            if not stream.has_ended:
                self._start(loaded.result(), request, stream, accepted)

    def _start(self, model: Model, request: Request, stream: Stream, accepted: float) -> None:
        """Answer from the cache, join identical work, or hand a new sequence to the step loop."""
        layouts = model.layouts(request.shown, self.config.max_image_megapixels, lambda: not stream.has_ended)
        prompt = model.prompts.build(request.messages, layouts, tools=request.tools, thinking=request.thinking)
        stream.reader = model.prompts.reader(request.tools, opens_thinking=prompt.opens_thinking)
        max_tokens = _fit(prompt.extent, request.sampling.max_tokens, model.context_length)
        key = self._answer_key(model, request, prompt)
        if (answer := self._known_answer(model, key)) is not None:
            _replay(answer, stream, accepted)
            return
        with self._jobs_lock:
            if key is not None and key in self._jobs and self._jobs[key].subscribe(stream):
                return
            job = self._new_job(model, request, prompt, stream, accepted, max_tokens, key)
            self._numbers += 1
            number = self._numbers
        try:
            features = [self._known_features(model, layout.key) for layout in layouts]
            known = [layout if one is not None else None for layout, one in zip(layouts, features, strict=True)]
            limit = self.config.max_image_megapixels
            images = model.image_inputs(request.shown, known, limit, lambda: not job.is_abandoned)
            grammar = model.grammars.matcher(request.sampling.schema)
            sampler = SamplerState(request.sampling, prompt.token_ids, grammar=grammar)
            job.on_prepared()
            model.add(Sequence(number, prompt, images, features, sampler, max_tokens, job))
        except EngineError as error:
            job.fail(error)
        except Exception:
            job.fail(EngineError("preparing the request failed"))
            raise

    def _answer_key(self, model: Model, request: Request, prompt: Prompt) -> bytes | None:
        if not (self.config.cache_enabled and request.sampling.is_deterministic):
            return None
        keys = [span.key for span in prompt.image_spans]
        return answer_key(model.numerics, prompt.token_ids, keys, request.sampling)

    def _known_answer(self, model: Model, key: bytes | None) -> Answer | None:
        if key is None or self._answers is None:
            return None
        answer = self._answers.get(key)
        self._counts.looked_up(model.name, "answers", found=answer is not None)
        return answer

    def _new_job(
        self,
        model: Model,
        request: Request,
        prompt: Prompt,
        stream: Stream,
        accepted: float,
        max_tokens: int,
        key: bytes | None,
    ) -> Job:
        """New work; others may join it until it is over, and its answer is kept when it may be."""

        def keep(text: str, finished: Finished) -> None:
            self._counts.computed(model.name, finished)
            if key is not None and self._answers is not None:
                self._answers.put(key, Answer(text, finished.reason, finished.usage))

        def forget() -> None:
            with self._jobs_lock:
                if key is not None and self._jobs.get(key) is job:
                    del self._jobs[key]

        job = Job(
            replace(request.sampling, max_tokens=max_tokens),
            prompt,
            stream,
            detokenizer=model.prompts.detokenizer(),
            eos=frozenset(model.artifact.spec.tokens.eos),
            accepted=accepted,
            on_finish=keep,
            on_end=forget,
        )
        if key is not None:
            self._jobs[key] = job
        return job

    def _known_features(self, model: Model, key: bytes) -> NDArray[np.floating] | None:
        if self._features is None:
            return None
        features = self._features.get(feature_key(key, model.numerics))
        self._counts.looked_up(model.name, "features", found=features is not None)
        return features

    def _keep_features(self, numerics: str, key: bytes, features: NDArray[np.floating]) -> None:
        assert self._features is not None, "This is a bug: nobody asked for features."
        self._features.put(feature_key(key, numerics), features)

    def _run_clock(self) -> None:
        while not self._stopped.wait(CLOCK_S):
            self._expire()
            self._stop_waiting()
            self._unload_idle()

    def _expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            expired = [stream for stream in self._open if stream.deadline <= now]
        for stream in expired:
            stream.push(DeadlineExceeded("the request passed its time limit; raise request_timeout_s or ask for less"))

    def _stop_waiting(self) -> None:
        """A download goes on without those whom it takes too long."""
        now = time.monotonic()
        with self._lock:
            late = [(stream, name) for stream, (name, until) in self._arrivals.items() if until <= now]
        for stream, name in late:
            if self._downloads.is_running(name):
                stream.push(self._downloads.note(name))

    def _unload_idle(self) -> None:
        """Give up models that nobody asked anything for long enough; the next request loads them again."""
        if not self.config.idle_unload_minutes:
            return
        limit = time.monotonic() - 60 * self.config.idle_unload_minutes
        with self._lock:
            in_use = set(self._open.values())
            idle = [name for name, used in self._last_used.items() if used < limit and name not in in_use]
            futures = [self._models.pop(name) for name in idle if self._models[name].done()]
            for name in idle:
                if name not in self._models:
                    del self._last_used[name]
        for future in futures:
            if not future.exception():
                logger.info("unloading model %s, which nobody used for a while", future.result().name)
                future.result().close()

    def _ended(self, stream: Stream) -> None:
        with self._lock:
            name = self._open.pop(stream, None)
            self._arrivals.pop(stream, None)
            if name is not None:
                self._last_used[name] = time.monotonic()
        if name is not None and stream.last is not None:
            self._counts.ended(name, stream.last)
        for loop in self._loops:
            loop.on_stream_end()


def _leave_to_the_end() -> None:
    """Take what is loaded by now out of the garbage collector's rounds, which would stop every step for up to 0.1 s."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _fit(prompt_tokens: int, max_tokens: int, context_length: int) -> int:
    """Output tokens that the context has room for. Raises ContextOverflow when the prompt fills it."""
    room = context_length - prompt_tokens
    if room < 1:
        raise ContextOverflow(
            f"the prompt is {prompt_tokens} tokens; the context holds {context_length}, the answer included. "
            "Shorten the prompt, use fewer images, or raise kv_cache_mib (on a GPU, gpu_memory) if that is the smaller"
            " limit"
        )
    return min(max_tokens, room)


def _replay(answer: Answer, stream: Stream, accepted: float) -> None:
    """A kept answer as the stream of one chunk."""
    elapsed = time.monotonic() - accepted
    if answer.text:
        stream.push(Chunk(answer.text, answer.usage.completion_tokens))
    stream.push(Finished(answer.reason, answer.usage, Timings(elapsed, elapsed, elapsed), from_cache=True))
