"""./tessera bench: throughput and latency of the plugin, through Dify's protocol, with generated traffic.

`serve` drives one configuration at several concurrencies. `ladder` runs the same requests, 20 % of them repeats, at the
same load through three configurations. `latency` times answers and images that were seen before a restart. Each prints
a card, a table and, with --json, one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli import latency
from cli.daemon import Daemon
from cli.machine import card, peak_memory
from cli.measured import Measured, ask, summary
from cli.settings import add_device_settings, add_engine_settings, settings_from
from cli.traffic import Size, TrafficRequest, traffic
from engine.errors import InvalidConfig

ROOT = Path(__file__).resolve().parent.parent
Settings = dict[str, str]
LADDER: dict[str, Settings] = {
    "fp32, one at a time": {"precision": "fp32", "max_batch_size": "1", "cache_enabled": "false"},
    "fp32, batching": {"precision": "fp32", "cache_enabled": "false"},
    "int8, batching, cache": {"precision": "int8", "cache_enabled": "true"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="serve|ladder|latency")
    serve = kinds.add_parser("serve", help="one configuration at several concurrencies")
    serve.add_argument("--concurrency", default="1,8,32", help="comma-separated (default: 1,8,32)")
    serve.add_argument("--cache", action="store_true", help="leave the answer cache on (default: off)")
    serve.add_argument("--repeats", type=float, default=0.0, help="share of requests that repeat an earlier one")
    ladder = kinds.add_parser("ladder", help="three configurations on the same traffic, 20 %% of it repeats")
    ladder.add_argument("--concurrency", type=int, default=32)
    saved = kinds.add_parser("latency", help="answers and images that were seen before a restart, one at a time")
    add_engine_settings(serve)
    add_device_settings(ladder)
    add_device_settings(saved)
    for kind in (serve, ladder, saved):
        kind.add_argument("--model", default="demo")
        kind.add_argument("--requests", type=int, help="requests per row (default: enough for a few seconds)")
        kind.add_argument("--output-tokens", type=int, default=32)
        kind.add_argument("--image-size", default="128x128")
        kind.add_argument("--seed", type=int, default=0)
        kind.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    saved.set_defaults(image_size="1280x960")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when every request of every row was answered."""
    try:
        rows = list(_rows(arguments))
    except InvalidConfig as error:
        print(f"tessera bench: {error}", file=sys.stderr)
        return 1
    result = {"bench": arguments.kind, "model": arguments.model, "card": card(), "rows": rows}
    if arguments.kind != "latency" and all(row["requests"] for row in rows):
        result["ratios"] = _ratios(rows)
    _print_card(result["card"])
    latency.print_table(rows) if arguments.kind == "latency" else _print_table(result)
    if arguments.json:
        print(json.dumps(result))
    return 0 if all(row["failed"] == 0 and row["requests"] for row in rows) else 1


def _rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    match arguments.kind:
        case "serve":
            yield from _serve(arguments)
        case "ladder":
            yield from _ladder(arguments)
        case "latency":
            yield from latency.rows(arguments, _image_size(arguments))


def _serve(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    settings = {"precision": "auto", **settings_from(arguments), "cache_enabled": str(arguments.cache).lower()}
    requests = _traffic(arguments, arguments.requests or 480, arguments.repeats, arguments.seed)
    for concurrency in (int(word) for word in arguments.concurrency.split(",")):
        yield {"row": f"{concurrency} concurrent", **measure(arguments, settings, requests, concurrency)}


def _ladder(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    requests = _traffic(arguments, arguments.requests or 400, 0.2, arguments.seed)
    chosen = settings_from(arguments)
    for name, settings in LADDER.items():
        yield {"row": name, **measure(arguments, chosen | settings, requests, arguments.concurrency)}


def _traffic(arguments: argparse.Namespace, count: int, repeats: float, seed: int) -> list[TrafficRequest]:
    return traffic(count, repeats=repeats, size=_image_size(arguments), seed=seed)


def _image_size(arguments: argparse.Namespace) -> Size:
    width, height = (int(word) for word in arguments.image_size.split("x"))
    return width, height


def measure(
    arguments: argparse.Namespace, settings: Settings, requests: Sequence[TrafficRequest], concurrency: int
) -> dict[str, Any]:
    """Start the plugin on an empty storage folder, warm it up, send the requests, `concurrency` at a time."""
    parameters = {"max_tokens": arguments.output_tokens, "ignore_eos": True, "temperature": 0.0}
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as storage:
        credentials = {"storage": storage, "max_waiting": "1024", **settings}
        with Daemon(ROOT, credentials=credentials) as daemon:
            _drive(daemon, arguments.model, traffic(2 * concurrency, seed=-1), parameters, concurrency)  # warm-up
            measured = _drive(daemon, arguments.model, requests, parameters, concurrency)
            memory = peak_memory(daemon.pid)
        row = summary(measured)
        sizes = [path.stat().st_size for path in Path(storage).glob("artifacts/*/weights.bin")]
    return {**settings, "concurrency": concurrency, **row, "memory_mib": memory, "weight_bytes": sum(sizes)}


def _drive(
    daemon: Daemon,
    model: str,
    requests: Sequence[TrafficRequest],
    parameters: Mapping[str, Any],
    concurrency: int,
) -> list[Measured]:
    """A closed loop: each of `concurrency` callers sends its next request when its last one is answered."""
    remaining, lock, measured = iter(requests), threading.Lock(), list[Measured]()

    def caller() -> None:
        while True:
            with lock:
                request = next(remaining, None)
            if request is None:
                return
            measured.append(ask(daemon, model, request.messages(), parameters))

    callers = [threading.Thread(target=caller) for _ in range(concurrency)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    return measured


def _ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last row against the first: how many times the throughput, and, at the same load, how many times less."""
    first, last = rows[0], rows[-1]
    ratios = {"throughput": last["output_token_throughput"] / first["output_token_throughput"]}
    if first["concurrency"] == last["concurrency"]:
        ratios["mean_latency"] = first["latency_ms"]["mean"] / last["latency_ms"]["mean"]
        ratios["weight_bytes"] = first["weight_bytes"] / last["weight_bytes"]
    return {name: round(ratio, 2) for name, ratio in ratios.items()}


def _print_card(values: Mapping[str, Any]) -> None:
    print("  ".join(f"{name}: {value}" for name, value in values.items()), file=sys.stderr)


def _print_table(result: Mapping[str, Any]) -> None:
    header = ("", "req/s", "tok/s", "TTFT p50", "p99", "TPOT p50", "E2EL mean", "p99 ms", "hits", "MiB")
    print(("{:<24}" + "{:>10}" * 9).format(*header))
    for row in result["rows"]:
        if not row["requests"]:
            print(f"{row['row']:<24}  failed: {row['errors']}")
            continue
        ttft, tpot, latency = row["ttft_ms"], row["tpot_ms"] or {"median": 0.0}, row["latency_ms"]
        times = (ttft["median"], ttft["p99"], tpot["median"], latency["mean"], latency["p99"])
        figures = [f"{row['request_throughput']:.1f}", f"{row['output_token_throughput']:.0f}"]
        figures += [f"{value:.1f}" for value in times] + [str(row["cache_hits"]), str(sum(row["memory_mib"].values()))]
        print(("{:<24}" + "{:>10}" * 9).format(row["row"], *figures))
    if ratios := result.get("ratios"):
        print("last row against the first: " + ", ".join(f"{name} {value:.2f}x" for name, value in ratios.items()))
