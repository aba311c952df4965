"""A running engine, live: load, KV memory, throughput, latencies and caches, as its metrics port tells them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

from cli.figures import Scrape, figures

PORT = 9464
TIMEOUT_S = 5.0
WINDOW_S = 30.0  # of latencies in the live view
BAR = 20  # characters
_MIB = 2**20

# The second screen of a terminal, as `less` uses it, so that what was there comes back.
ENTER, LEAVE, CLEAR = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l", "\x1b[H\x1b[J"


class NoEngine(Exception):
    """Nothing that is Tessera answers at the port."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=PORT, help=f"the form's metrics port ({PORT})")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two looks (2)")
    parser.add_argument("--once", action="store_true", help="look twice, print, end")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each look")


def run(args: argparse.Namespace) -> int:
    """Until Ctrl-C; 1 when no engine answers the first time."""
    try:
        first = scrape(args.port)
    except NoEngine as problem:
        print(f"tessera: {problem}", file=sys.stderr)
        return 1
    on_screen = sys.stdout.isatty() and not (args.once or args.json)
    with _screen() if on_screen else contextlib.nullcontext():
        for told in _looks(first, args):
            _show(told, args, on_screen)
            if args.once:
                return 1 if isinstance(told, NoEngine) else 0
    return 0


def scrape(port: int) -> Scrape:
    """Raises NoEngine, saying what to look at."""
    where = f"127.0.0.1:{port}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has another 127.0.0.1
    try:
        with direct.open(f"http://{where}/metrics", timeout=TIMEOUT_S) as answer:
            return Scrape.parse(answer.read().decode(), time.monotonic())
    except (urllib.error.HTTPError, HTTPException, ValueError) as problem:
        raise NoEngine(f"what answers at {where} is not Tessera ({problem}); name its metrics port: --port N") from None
    except OSError as problem:
        reason = getattr(problem, "reason", problem)
        raise NoEngine(
            f"no engine answers at {where} ({getattr(reason, 'strerror', None) or reason}). Set Metrics port"
            f" (metrics_port) in the provider's form to {port} and ask a model something: the engine starts with its"
            " first request. A plugin in a container is seen from its network alone. Another port: --port N"
        ) from None


def _looks(first: Scrape, args: argparse.Namespace) -> Iterator[dict[str, Any] | NoEngine]:
    """Figures for ever. An engine that is gone is waited for: Dify may be replacing it."""
    past = deque([first])
    while True:
        time.sleep(max(args.interval, 0.1))
        try:
            now = scrape(args.port)
        except NoEngine as problem:
            yield problem
            continue
        if now.started_s != past[-1].started_s:  # anew: its counters are too
            past = deque([now])
        while len(past) > 1 and now.taken_s - past[0].taken_s > WINDOW_S:
            past.popleft()
        yield figures(past[-1], now, latencies_since=None if args.once else past[0])
        past.append(now)


def _show(told: dict[str, Any] | NoEngine, args: argparse.Namespace, on_screen: bool) -> None:
    if isinstance(told, NoEngine):
        print(f"{CLEAR if on_screen else ''}tessera: {told}", file=sys.stdout if on_screen else sys.stderr, flush=True)
    elif args.json:
        print(json.dumps(told), flush=True)
    else:
        span = "since the engine's start" if args.once else f"of the last {WINDOW_S:g} s"
        print(f"{CLEAR if on_screen else ''}{view(told, span)}", end="\n" if on_screen else "\n\n", flush=True)


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    print(ENTER, end="", flush=True)
    try:
        yield
    finally:
        print(LEAVE, end="", flush=True)


def view(told: dict[str, Any], span: str) -> str:
    """The figures in words and bars; `span` says what the latencies are of."""
    requests, tokens, caches = told["requests"], told["tokens_per_s"], told["caches"]
    lines = [
        f"requests   {requests['open']:,.0f} open, {requests['per_s']:,.1f} ended/s;"
        f" {requests['ended']:,.0f} ended, {requests['failed']:,.0f} of them with an error",
        f"tokens     {tokens['output']:,.0f} out/s, {tokens['prefill']:,.0f} prefill/s",
        *_latencies(told["latency_s"], span),
        f"caches     answers {_hits(caches['answers'])}, image features {_hits(caches['features'])},"
        f" prompt tokens {_hits(caches['prefix'])}",
        f"memory     {told['resident_bytes'] / _MIB:,.0f} MiB of the host",
    ]
    return "\n".join([*lines, "", *_replicas(told["replicas"])])


def _latencies(told: dict[str, dict[str, float] | None], span: str) -> Iterator[str]:
    names = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "whole", "queue": "queue", "step": "step"}
    for key, name in names.items():
        times = told[key]
        shown = "nothing yet" if times is None else ", ".join(f"{word} {_time(times[word])}" for word in times)
        yield f"{name:<10} {shown}" + (f"  ({span})" if key == "ttft" else "")


def _replicas(replicas: list[dict[str, Any]]) -> Iterator[str]:
    if not replicas:
        yield "no model is loaded"
        return
    width = max(len("model"), *(len(replica["model"]) for replica in replicas))
    head = f"{'model':<{width}}  {'device':<8} running waiting  "
    yield f"{head}{'KV blocks used':<{BAR + 5}}  indexed  memory"
    for replica in replicas:
        share = replica["kv_blocks_used"] / max(replica["kv_blocks"], 1)
        bar = ("#" * round(share * BAR)).ljust(BAR, ".")
        indexed = replica["kv_blocks_indexed"] / max(replica["kv_blocks"], 1)
        memory = ", ".join(f"{kind} {size / _MIB:,.0f} MiB" for kind, size in replica["memory_bytes"].items())
        yield (
            f"{replica['model']:<{width}}  {replica['device']:<8} {replica['running']:>7.0f} {replica['waiting']:>7.0f}"
            f"  {bar} {share:>4.0%}  {indexed:>7.0%}  {memory}"
        )


def _hits(cache: dict[str, float]) -> str:
    queries, hits = cache["queries"], cache["hits"]
    return f"{hits:,.0f} of {queries:,.0f}" + (f" ({hits / queries:.0%})" if queries else "")


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.1f} ms"
