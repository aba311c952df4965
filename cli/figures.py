"""An engine's metrics (engine/metrics.py) as figures: rates between two scrapes, quantiles, what is occupied."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

QUANTILES = {"p50": 0.5, "p95": 0.95}
LATENCIES = {
    "ttft": "time_to_first_token",
    "tpot": "time_per_output_token",
    "e2e": "e2e_request_latency",
    "queue": "request_queue_time",
    "step": "step",
}
_REPLICA = ("num_requests_running", "num_requests_waiting", "kv_blocks", "kv_blocks_used", "kv_blocks_indexed")

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Scrape:
    """One answer of the metrics port. `taken_s` is a time.monotonic() value."""

    taken_s: float
    samples: dict[str, list[tuple[Labels, float]]]

    @classmethod
    def parse(cls, text: str, taken_s: float) -> Scrape:
        """Raises ValueError for what is not Prometheus' text format, or not Tessera's."""
        samples: dict[str, list[tuple[Labels, float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        if "tessera_open_requests" not in samples:
            raise ValueError("no metric of Tessera's is in it")
        return cls(taken_s, samples)

    @property
    def started_s(self) -> float:
        """When the engine's process started, in seconds of the epoch."""
        return sum(value for _, value in self.samples.get("process_start_time_seconds", ()))

    def of(self, name: str, **labels: str) -> Iterator[tuple[Labels, float]]:
        """Tessera's samples of a name that have these labels."""
        for found, value in self.samples.get(f"tessera_{name}", ()):
            if labels.items() <= found.items():
                yield found, value

    def total(self, name: str, **labels: str) -> float:
        """Their sum."""
        return sum(value for _, value in self.of(name, **labels))

    def buckets(self, name: str) -> dict[float, float]:
        """A histogram's upper bounds and how many are at most that, over all its labels."""
        found: dict[float, float] = {}
        for labels, value in self.of(f"{name}_seconds_bucket"):
            bound = float(labels["le"])
            found[bound] = found.get(bound, 0.0) + value
        return dict(sorted(found.items()))


def figures(before: Scrape, now: Scrape, *, latencies_since: Scrape | None) -> dict[str, Any]:
    """Plain values for `--json` and the view. Rates lie between the two scrapes; latencies, in seconds, go back to
    `latencies_since`, with None to the engine's start."""
    elapsed = max(now.taken_s - before.taken_s, 1e-9)

    def rate(name: str) -> float:
        return (now.total(name) - before.total(name)) / elapsed

    outcomes = [(labels["outcome"], value) for labels, value in now.of("requests_total")]
    failed = sum(value for outcome, value in outcomes if outcome[:1].isupper())  # the class of an error
    return {
        "requests": {
            "open": now.total("open_requests"),
            "ended": sum(value for _, value in outcomes),
            "failed": failed,
            "per_s": rate("requests_total"),
        },
        "tokens_per_s": {"output": rate("generation_tokens_total"), "prefill": rate("prefill_tokens_total")},
        "latency_s": {key: latency(name, latencies_since, now) for key, name in LATENCIES.items()},
        "caches": {
            **{name: _cache(now, name) for name in ("answers", "features")},
            "prefix": {"queries": now.total("prompt_tokens_total"), "hits": now.total("prefix_cache_hits_total")},
        },
        "resident_bytes": sum(value for _, value in now.samples.get("process_resident_memory_bytes", ())),
        "replicas": [_replica(now, labels) for labels, _ in now.of("kv_blocks")],
    }


def _cache(now: Scrape, name: str) -> dict[str, float]:
    return {kind: now.total(f"cache_{kind}_total", cache=name) for kind in ("queries", "hits")}


def _replica(now: Scrape, labels: Labels) -> dict[str, Any]:
    told: dict[str, Any] = {"model": labels["model_name"], "device": labels["device"]}
    told |= {name.removeprefix("num_requests_"): now.total(name, **labels) for name in _REPLICA}
    memory = {found["kind"]: value for found, value in now.of("memory_bytes", **labels)}
    return told | {"memory_bytes": memory}


def latency(name: str, before: Scrape | None, now: Scrape) -> dict[str, float] | None:
    """Mean and quantiles of what a histogram took in; None when that is nothing."""
    earlier = before.buckets(name) if before else {}
    counts = {bound: count - earlier.get(bound, 0.0) for bound, count in now.buckets(name).items()}
    if counts.get(math.inf, 0.0) <= 0:
        return None
    total = now.total(f"{name}_seconds_sum") - (before.total(f"{name}_seconds_sum") if before else 0.0)
    mean = total / counts[math.inf]
    return {"mean": mean} | {key: quantile(share, counts) for key, share in QUANTILES.items()}


def quantile(share: float, counts: Mapping[float, float]) -> float:
    """As Prometheus' histogram_quantile: linear within a bucket, and the last bound for what lies beyond it."""
    rank = share * counts[math.inf]
    for (low, below), (high, count) in itertools.pairwise([(0.0, 0.0), *counts.items()]):
        if count >= rank:
            return low if math.isinf(high) else low + (high - low) * (rank - below) / max(count - below, 1e-9)
    return math.inf
