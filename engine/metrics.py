"""Prometheus metrics of an engine, named in vLLM's manner (vllm/v1/metrics/loggers.py), served on a loopback port.

Imported only when `metrics_port` asks for it. What happens is counted where it happens; what is, is asked of
`Engine.status` when somebody scrapes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, start_http_server
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from engine.errors import EngineError
from engine.request import Finished
from engine.stats import StepRecord

HOST = "127.0.0.1"
RETRY_S = 10.0  # an engine of an older version gives the port up when it ends

# Seconds: from a demo model's token to a request that waits for a download.
_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1, 2.5, 10)

logger = logging.getLogger(__name__)

Status = Callable[[], dict[str, Any]]


class Metrics:
    """What an engine counts. Any thread may call; each call costs a few microseconds.

    Times and tokens are of answers that were computed, once each however many identical requests shared the work.
    Generated tokens and prefill are counted by the step, so that they grow while a long answer is under way.
    """

    def __init__(self, status: Status) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside every series, which nobody reads
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        self.registry.register(_StatusCollector(status))
        model = ["model_name"]
        self._requests = self._counter(
            "requests", "Requests by how they ended: stop, length, an error's class.", "outcome"
        )
        self._ttft = self._times("time_to_first_token", "From acceptance to the first token.")
        self._tpot = self._times("time_per_output_token", "Of the tokens after the first, on average.", _STEP_BUCKETS)
        self._e2e = self._times("e2e_request_latency", "From acceptance to the last token.")
        self._prepare = self._times("request_prepare_time", "Template, image headers and pixels, model load included.")
        self._queue = self._times("request_queue_time", "From prepared to the first place in a step.")
        self._prefill = self._times("request_prefill_time", "From there to the first token, images included.")
        self._decode = self._times("request_decode_time", "From the first token to the last.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, images included.")
        self._image_tokens = self._counter("image_tokens", "Those of them that stand for images.")
        self._reused_tokens = self._counter("prefix_cache_hits", "Tokens of prompts found in the prefix index.")
        self._prefill_tokens = self._counter("prefill_tokens", "Tokens that prefill steps computed.")
        self._generated_tokens = self._counter("generation_tokens", "Tokens that steps sampled.")
        self._lookups = self._counter("cache_queries", "Lookups in the disk caches: answers, features.", "cache")
        self._hits = self._counter("cache_hits", "Lookups that found something.", "cache")
        labels = [*model, "device"]
        self._step = Histogram(
            "tessera_step_seconds", "One step of the loop.", labels, registry=self.registry, buckets=_STEP_BUCKETS
        )
        self._step_ended: dict[tuple[str, str], float] = {}

    def ended(self, model: str, event: Finished | EngineError) -> None:
        """A request ended. `model` is empty for one that is not loaded: names that callers make up are no labels."""
        self._requests.labels(model, event.code if isinstance(event, EngineError) else event.reason).inc()

    def computed(self, model: str, finished: Finished) -> None:
        """An answer was computed, for however many requests."""
        timings, usage = finished.timings, finished.usage
        decode_s = timings.total_s - timings.first_token_s
        self._ttft.labels(model).observe(timings.first_token_s)
        self._e2e.labels(model).observe(timings.total_s)
        self._prepare.labels(model).observe(timings.prepared_s)
        self._queue.labels(model).observe(timings.queued_s)
        self._prefill.labels(model).observe(timings.prefill_s)
        self._decode.labels(model).observe(decode_s)
        if usage.completion_tokens > 1:
            self._tpot.labels(model).observe(decode_s / (usage.completion_tokens - 1))
        self._prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self._image_tokens.labels(model).inc(usage.image_tokens)
        self._reused_tokens.labels(model).inc(usage.reused_tokens)

    def looked_up(self, model: str, cache: str, *, found: bool) -> None:
        """`cache` is answers or features."""
        self._lookups.labels(model, cache).inc()
        self._hits.labels(model, cache).inc(found)

    def on_step(self, record: StepRecord) -> None:
        """On the step loop's thread: a step lasts from the end of the one before it, when they overlap."""
        key = (record.model, record.device)
        began = max(record.started_s, self._step_ended.get(key, 0.0))
        self._step_ended[key] = record.finished_s
        self._step.labels(*key).observe(record.finished_s - began)
        self._prefill_tokens.labels(record.model).inc(record.prefill_tokens)
        self._generated_tokens.labels(record.model).inc(record.tokens_out)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tessera_{name}", text, ["model_name", *labels], registry=self.registry)

    def _times(self, name: str, text: str, buckets: tuple[float, ...] = _REQUEST_BUCKETS) -> Histogram:
        return Histogram(f"tessera_{name}_seconds", text, ["model_name"], registry=self.registry, buckets=buckets)


class _StatusCollector(Collector):
    """What is loaded, runs, waits and is occupied at the moment of a scrape."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        models = status["models"]
        yield _gauge("open_requests", "Requests that were accepted and have not ended.", status["open_requests"])
        yield _gauge("models_loaded", "Models in memory.", len(models))
        replicas = [(name, replica) for name, told in models.items() for replica in told["replicas"]]
        for key, name, text in (
            ("running", "num_requests_running", "Sequences that are computed."),
            ("waiting", "num_requests_waiting", "Sequences that wait for a place in the batch."),
            ("kv_blocks", "kv_blocks", "Blocks of KV memory."),
            ("kv_blocks_used", "kv_blocks_used", "Blocks of running sequences."),
            ("kv_blocks_indexed", "kv_blocks_indexed", "Blocks that the prefix index can find."),
        ):
            yield _gauges(name, text, [((model, replica["device"]), replica[key]) for model, replica in replicas])
        memory = _gauges("memory_bytes", "Of a loaded model on its device: weights, kv, workspace.", [], "kind")
        for model, replica in replicas:
            for kind in ("weights", "kv", "workspace"):
                memory.add_metric([model, replica["device"], kind], replica["memory"][kind])
        yield memory


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"tessera_{name}", text, value=value)


def _gauges(name: str, text: str, samples: list[tuple[tuple[str, ...], float]], *labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"tessera_{name}", text, labels=["model_name", "device", *labels])
    for values, value in samples:
        family.add_metric(list(values), value)
    return family


class MetricsServer:
    """Serves a registry at http://127.0.0.1:PORT/metrics from a thread of its own.

    A port that cannot be had is a line in the log, and is tried again: two engines with one port are normal while
    Dify replaces a version of the plugin.
    """

    def __init__(self, port: int, registry: CollectorRegistry, *, retry_s: float = RETRY_S) -> None:
        self._port = port
        self._registry = registry
        self._retry_s = retry_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the port up."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        complained = False
        while not self._closing.is_set():
            try:
                server, _ = start_http_server(self._port, HOST, self._registry)
            except OSError as problem:
                if not complained:
                    logger.warning(
                        "metrics are not served yet: port %d of %s cannot be had (%s). Another engine may have it;"
                        " it is tried again every %g s. metrics_port in the form names another one",
                        *(self._port, HOST, problem.strerror or problem, self._retry_s),
                    )
                complained = True
                self._closing.wait(self._retry_s)
                continue
            logger.info("metrics are served at http://%s:%d/metrics", HOST, self._port)
            self._closing.wait()
            server.shutdown()
            server.server_close()
