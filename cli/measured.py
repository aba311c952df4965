"""What was measured of each request, summed up in the field's words (the definitions of `vllm bench serve`)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cli.daemon import Daemon, PluginCrashed, PluginError, RequestTimeout


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds on one clock; `error` is set instead of the rest when a request failed."""

    started: float
    first_token: float = 0.0
    finished: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    from_cache: bool = False
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.first_token - self.started

    @property
    def latency(self) -> float:
        """End to end."""
        return self.finished - self.started

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        return (self.finished - self.first_token) / max(1, self.output_tokens - 1)


def ask(daemon: Daemon, model: str, messages: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> Measured:
    """Send one request and read its whole answer."""
    session = daemon.invoke_llm(messages, parameters, model=model)
    last: dict[str, Any] = {}
    try:
        for chunk in session:
            last = chunk
    except (PluginError, PluginCrashed, RequestTimeout) as error:
        return Measured(session.sent_at, error=f"{type(error).__name__}: {error}")
    usage = last["delta"]["usage"]
    return Measured(
        started=session.sent_at,
        first_token=session.arrivals[0],
        finished=session.arrivals[-1],
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        from_cache="cache" in (last.get("system_fingerprint") or ""),
    )


def summary(measured: Sequence[Measured]) -> dict[str, object]:
    """Throughputs per second, times in milliseconds."""
    good = [one for one in measured if one.error is None]
    if not good:
        return {"requests": 0, "failed": len(measured), "errors": errors(measured)}
    duration = max(one.finished for one in good) - min(one.started for one in measured)
    generated = [one for one in good if not one.from_cache]
    return {
        "requests": len(good),
        "failed": len(measured) - len(good),
        "errors": errors(measured),
        "duration_s": round(duration, 3),
        "input_tokens": sum(one.prompt_tokens for one in good),
        "output_tokens": sum(one.output_tokens for one in good),
        "request_throughput": round(len(good) / duration, 3),
        "output_token_throughput": round(sum(one.output_tokens for one in good) / duration, 2),
        "cache_hits": sum(one.from_cache for one in good),
        "ttft_ms": distribution([one.ttft for one in good]),
        "tpot_ms": distribution([one.tpot for one in generated if one.output_tokens > 1]),
        "latency_ms": distribution([one.latency for one in good]),
    }


def errors(measured: Sequence[Measured]) -> list[str]:
    """The first few that differ."""
    return sorted({one.error for one in measured if one.error is not None})[:5]


def distribution(seconds: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds; None when there is nothing to sum up."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    values = {"mean": statistics.fmean(ordered), "median": statistics.median(ordered), "p99": p99}
    return {name: round(1000 * value, 3) for name, value in values.items()}
