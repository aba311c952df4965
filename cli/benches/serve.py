"""`bench serve`: one configuration at several concurrencies, through Dify's protocol."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.benches import options
from cli.benches.in_process import ensure_model, storage_folder
from cli.benches.report import BenchError, Report, Row
from cli.daemon import Daemon
from cli.machine import gpu_mib, peak_memory
from cli.measured import Measured, ask, summary
from cli.memory import Entry, opened_memory
from cli.plugin import plugin
from cli.settings import add_engine_settings, settings_from
from cli.traffic import TrafficRequest, traffic
from engine.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
PLAIN_BATCH = 32  # the setting's own default
REQUESTS = 960  # so that filling the batch and draining it weigh little
TRACE_DELAY_S = 1.0
TRACE_S = 1.5
TRACED = 8  # requests for each of the concurrent ones: longer than the trace
TRACE_LIMIT_S = 60.0
COLUMNS = (
    ("req/s", "request_throughput"),
    ("tok/s", "output_token_throughput"),
    ("TTFT p50", "ttft_ms.median"),
    ("p99", "ttft_ms.p99"),
    ("TPOT p50", "tpot_ms.median"),
    ("E2EL mean", "latency_ms.mean"),
    ("p99 ms", "latency_ms.p99"),
    ("hits", "cache_hits"),
    ("MiB", "memory_mib.all"),
    ("kernels/wall", "trace.kernel_share"),
)
Settings = dict[str, str]


@dataclass(frozen=True, slots=True)
class Load:
    """What every row of a bench sends. `storage` None: an empty folder for each row."""

    model: str
    requests: Sequence[TrafficRequest]
    warm_up: Sequence[TrafficRequest]
    output_tokens: int
    storage: Path | None = None
    traced: Sequence[TrafficRequest] = ()  # sent while the engine's process traces its kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=options.integers, default="1,8,32", help="default: 1,8,32")
    parser.add_argument("--against", metavar="DEVICE", help="rows on this device first: what --device gains by it")
    parser.add_argument("--cache", action="store_true", help="leave the answer cache on (default: off)")
    parser.add_argument("--repeats", type=float, default=0.0, help="share of requests that repeat an earlier one")
    parser.add_argument("--trace", action="store_true", help="kernel time over wall time, after the timed requests")
    add_engine_settings(parser)
    options.add_shaped_traffic(parser)


def measure(arguments: argparse.Namespace) -> Report:
    if arguments.trace and gpu_mib() is None:
        raise BenchError("--trace traces kernels of a CUDA device; there is none")
    settings = {"precision": "auto", **settings_from(arguments), "cache_enabled": str(arguments.cache).lower()}
    places = [{"device": arguments.against}, {}] if arguments.against else [{}]
    most = max(arguments.concurrency)
    with open_load(arguments, most, arguments.requests or REQUESTS, arguments.repeats, traced=arguments.trace) as load:
        rows = [
            {"row": _name(concurrency, settings | place), **measure_row(load, settings | place, concurrency)}
            for place in places
            for concurrency in arguments.concurrency
        ]
    return report_of(rows, rows if not arguments.against else [one for one in rows if _is_last_load(one, arguments)])


def _is_last_load(row: Row, arguments: argparse.Namespace) -> bool:
    return bool(row["concurrency"] == arguments.concurrency[-1])


def _name(concurrency: int, settings: Settings) -> str:
    return f"{concurrency} concurrent" + (f", {settings['device']}" if "device" in settings else "")


def report_of(rows: Sequence[Row], compared: Sequence[Row] = ()) -> Report:
    """The rows, the last of those to compare against the first; what their engines occupied goes to the card."""
    card = {"memory": [{"row": row["row"], **entry} for row in rows for entry in row["memory"]]}
    kept = [{name: value for name, value in row.items() if name != "memory"} for row in rows]
    return Report(kept, card, extra=ratios(compared))


def memory_of(settings: Mapping[str, str], model: str) -> list[Entry]:
    """What the engine of a row that was measured occupies. A row stays one where this cannot be told any more."""
    try:
        return opened_memory(settings, model)
    except EngineError as error:
        return [{"model": model, "problem": f"{type(error).__name__}: {error}"}]


@contextlib.contextmanager
def open_load(
    arguments: argparse.Namespace, concurrency: int, count: int, repeats: float, *, traced: bool = False
) -> Iterator[Load]:
    """`count` requests for rows of up to so many concurrent ones, and the weights of the shape, if it is one."""
    requests = shaped_traffic(arguments, count, repeats)
    warm_up = shaped_traffic(arguments, 2 * concurrency, seed=-1)
    more = shaped_traffic(arguments, TRACED * concurrency, seed=-2) if traced else []
    if arguments.shape is None:
        yield Load(arguments.model, requests, warm_up, arguments.output_tokens, None, more)
        return
    with storage_folder(arguments) as storage:
        model = ensure_model(arguments.shape, "whole", storage)
        yield Load(model, requests, warm_up, arguments.output_tokens, storage, more)


def shaped_traffic(
    arguments: argparse.Namespace, count: int, repeats: float = 0.0, *, seed: int | None = None
) -> list[TrafficRequest]:
    """A shape's requests have photographs' worth of detail: how long a JPEG takes to decode depends on it."""
    characters = arguments.prompt_tokens or (64 if arguments.shape else None)
    return traffic(
        count,
        repeats=repeats,
        size=arguments.image_size,
        seed=arguments.seed if seed is None else seed,
        form=arguments.image_format,
        characters=characters,
        detailed=arguments.shape is not None,
    )


def measure_row(load: Load, settings: Settings, concurrency: int) -> Row:
    """Start the plugin, warm it up, send the requests, `concurrency` at a time."""
    parameters = {"max_tokens": load.output_tokens, "ignore_eos": True, "temperature": 0.0}
    settings = {"max_batch_size": str(max(PLAIN_BATCH, concurrency)), **settings}
    with contextlib.ExitStack() as stack:
        storage = load.storage or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tessera-bench-")))
        shutil.rmtree(storage / "cache", ignore_errors=True)
        traces = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tessera-trace-")))
        env = {"TESSERA_TRACE": str(traces)} if load.traced else {}
        credentials = {"max_waiting": "1024", **settings, "storage": str(storage)}
        with plugin(ROOT, credentials, env) as daemon:
            together = min(concurrency, int(settings["max_batch_size"]))  # one at a time warms up with few
            drive(daemon, load.model, load.warm_up[: 2 * together], parameters, concurrency)
            measured = drive(daemon, load.model, load.requests, parameters, concurrency)
            peak, device = peak_memory(daemon.pid), gpu_mib()
            traced = {"trace": _trace(daemon, load, parameters, concurrency, traces)} if load.traced else {}
        memory = memory_of(credentials, load.model)
    peak["all"] = sum(peak.values())
    result = {**settings, "concurrency": concurrency, **summary(measured), "memory_mib": peak, "gpu_mib": device}
    return result | {"weight_bytes": memory[0].get("weights"), "memory": memory} | traced


def drive(
    daemon: Daemon, model: str, requests: Sequence[TrafficRequest], parameters: Mapping[str, Any], concurrency: int
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


def _trace(daemon: Daemon, load: Load, parameters: Mapping[str, Any], concurrency: int, folder: Path) -> dict[str, Any]:
    """More of the same load, new images, while the engine's process traces (engine/runtime/cuda/trace.py)."""
    sender = threading.Thread(
        target=drive, args=(daemon, load.model, load.traced[: TRACED * concurrency], parameters, concurrency)
    )
    sender.start()
    time.sleep(TRACE_DELAY_S)
    (folder / "seconds").write_text(str(TRACE_S))
    deadline, found = time.monotonic() + TRACE_LIMIT_S, folder / "trace.json"
    while not found.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    sender.join()
    if not found.exists():
        raise BenchError(f"the engine's process wrote no trace within {TRACE_LIMIT_S:.0f} s; its stderr says why")
    times: dict[str, Any] = json.loads(found.read_text())
    return times


def ratios(rows: Sequence[Row]) -> dict[str, Any]:
    """The last row against the first: how many times the throughput, and, at the same load, how many times less."""
    if len(rows) < 2 or not all(row["requests"] for row in rows):
        return {}
    first, last = rows[0], rows[-1]
    found = {"throughput": last["output_token_throughput"] / first["output_token_throughput"]}
    if first["concurrency"] == last["concurrency"]:
        found["mean_latency"] = first["latency_ms"]["mean"] / last["latency_ms"]["mean"]
        if first["weight_bytes"] and last["weight_bytes"]:
            found["weight_bytes"] = first["weight_bytes"] / last["weight_bytes"]
    return {"ratios": {name: round(ratio, 2) for name, ratio in found.items()}}
