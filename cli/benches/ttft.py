"""`bench ttft`: the first token of a request with a new image, and with image and prompt known, on an idle engine.

One request at a time, through Dify's protocol. Answers are sampled without a seed, so that a repeated request is
computed and not answered from the cache; what it finds is the image's features and the prompt's keys and values.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from cli.benches import options
from cli.benches.in_process import ensure_model, storage_folder
from cli.benches.report import Report, Row
from cli.benches.serve import ROOT, memory_of, shaped_traffic
from cli.daemon import Daemon
from cli.machine import gpu_mib, peak_memory
from cli.measured import Measured, ask, distribution, errors
from cli.plugin import plugin
from cli.settings import add_engine_settings, settings_from
from cli.traffic import TrafficRequest

WARM_UP = 5  # requests of their own, twice each, which load the model
COLUMNS = (
    ("requests", "requests"),
    ("prompt tokens", "prompt_tokens"),
    ("TTFT p50 ms", "ttft_ms.median"),
    ("p99", "ttft_ms.p99"),
    ("TPOT p50", "tpot_ms.median"),
    ("failed", "failed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_settings(parser)
    options.add_shaped_traffic(parser)
    parser.set_defaults(image_size=(640, 480), output_tokens=16, prompt_tokens=64)


def measure(arguments: argparse.Namespace) -> Report:
    with storage_folder(arguments) as storage, tempfile.TemporaryDirectory(prefix="tessera-bench-") as empty:
        model = arguments.model
        if arguments.shape is not None:
            model, empty = ensure_model(arguments.shape, "whole", storage), str(storage)
        return _measure(arguments, model, Path(empty))


def _measure(arguments: argparse.Namespace, model: str, storage: Path) -> Report:
    requests = shaped_traffic(arguments, arguments.requests or 100)
    parameters = {"max_tokens": arguments.output_tokens, "temperature": 1.0, "ignore_eos": True}
    settings = settings_from(arguments) | {"storage": str(storage), "cache_enabled": "true"}

    def twice(daemon: Daemon, request: TrafficRequest) -> tuple[Measured, Measured]:
        return (
            ask(daemon, model, request.messages(), parameters),
            ask(daemon, model, request.messages(), parameters),
        )

    with plugin(ROOT, settings) as daemon:
        for request in shaped_traffic(arguments, WARM_UP, seed=-1):
            twice(daemon, request)
        pairs = [twice(daemon, request) for request in requests]
        card: dict[str, Any] = {"memory_mib": peak_memory(daemon.pid), "gpu_mib": gpu_mib()}
    new, known = zip(*pairs, strict=True)
    card["memory"] = memory_of(settings, model)
    return Report([_row("new image", new), _row("image and prompt known", known)], card)


def _row(name: str, measured: tuple[Measured, ...]) -> Row:
    good = [one for one in measured if one.error is None]
    return {
        "row": name,
        "requests": len(good),
        "failed": len(measured) - len(good),
        "errors": errors(measured),
        "prompt_tokens": good[0].prompt_tokens if good else None,
        "ttft_ms": distribution([one.ttft for one in good]),
        "tpot_ms": distribution([one.tpot for one in good if one.output_tokens > 1]),
        "latency_ms": distribution([one.latency for one in good]),
    }
