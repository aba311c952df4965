"""./tessera top: figures from metrics that were made up, over a port as an engine serves them."""

from __future__ import annotations

import argparse
import json
import math
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from prometheus_client import generate_latest

from cli import top
from cli.figures import Scrape, figures, latency, quantile
from engine.errors import QueueFull
from engine.metrics import Metrics, MetricsServer
from engine.request import Finished, Timings, Usage
from engine.stats import StepRecord


def status() -> dict[str, Any]:
    blocks = {"kv_blocks": 200, "kv_blocks_used": 50, "kv_blocks_indexed": 20}
    memory = {"weights": 3 << 30, "kv": 1 << 30, "workspace": 1 << 29, "host": 1}
    replica = {"device": "cuda:0", "running": 12, "waiting": 3, "memory": memory} | blocks
    return {"open_requests": 17, "models": {"qwen": {"replicas": [replica]}}}


@pytest.fixture
def metrics() -> Metrics:
    counted = Metrics(status)
    for _ in range(4):
        counted.computed("qwen", Finished("stop", Usage(100, 11, 64, 25), Timings(0.01, 0.04, 0.54, 0.01, 0.02)))
        counted.ended("qwen", Finished("stop", Usage(100, 11, 64, 25), Timings(0.01, 0.04, 0.54)))
    counted.ended("qwen", QueueFull("full"))
    counted.looked_up("qwen", "answers", found=True)
    counted.looked_up("qwen", "answers", found=False)
    return counted


@pytest.fixture
def port(metrics: Metrics) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = int(probe.getsockname()[1])
    server = MetricsServer(found, metrics.registry, retry_s=0.01)
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", found)) == 0:
                break
    yield found
    server.close()


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    top.add_arguments(parser)
    return parser.parse_args(words)


def taken(metrics: Metrics, at_s: float) -> Scrape:
    return Scrape.parse(generate_latest(metrics.registry).decode(), at_s)


def test_once_shows_load_memory_latencies_and_caches(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert top.run(parse("--port", str(port), "--once", "--interval", "0.1")) == 0
    shown = capsys.readouterr().out
    assert "17 open" in shown
    assert "5 ended, 1 of them with an error" in shown
    assert "answers 1 of 2 (50%)" in shown
    assert "prompt tokens 100 of 400 (25%)" in shown
    assert "TTFT       mean 40.0 ms" in shown
    assert "TPOT       mean 50.0 ms" in shown
    row = shown.strip().splitlines()[-1].split()
    assert row[:4] == ["qwen", "cuda:0", "12", "3"]
    assert row[4:7] == ["#####...............", "25%", "10%"]
    assert "weights 3,072 MiB" in shown
    assert "\x1b" not in shown  # no terminal, no colours


def test_json_is_a_line_of_plain_values(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert top.run(parse("--port", str(port), "--once", "--json", "--interval", "0.1")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["requests"] == {"open": 17, "ended": 5, "failed": 1, "per_s": 0}
    assert told["latency_s"]["e2e"]["mean"] == pytest.approx(0.54)
    assert told["latency_s"]["step"] is None
    assert told["replicas"][0]["memory_bytes"]["kv"] == 1 << 30


def test_rates_lie_between_two_looks_and_latencies_since_the_one_that_is_named(metrics: Metrics) -> None:
    before = taken(metrics, 10.0)
    metrics.computed("qwen", Finished("stop", Usage(50, 21), Timings(0.1, 0.2, 0.4, 0.0, 0.1)))
    metrics.ended("qwen", Finished("stop", Usage(50, 21), Timings(0.1, 0.2, 0.4)))
    metrics.on_step(StepRecord("qwen", 1.0, 1.5, 0.1, 4, 100, 50, 0, 4, device="cuda:0"))
    now = taken(metrics, 12.0)
    told = figures(before, now, latencies_since=before)
    assert told["requests"]["per_s"] == 0.5
    assert told["tokens_per_s"] == {"output": 2.0, "prefill": 25.0}
    assert told["latency_s"]["ttft"]["mean"] == pytest.approx(0.2)
    assert told["latency_s"]["tpot"]["mean"] == pytest.approx(0.01)
    assert told["latency_s"]["step"]["mean"] == pytest.approx(0.5)
    assert figures(before, now, latencies_since=None)["latency_s"]["ttft"]["mean"] == pytest.approx(0.36 / 5)
    assert latency("time_to_first_token", now, now) is None


def test_a_quantile_is_prometheus_own() -> None:
    counts = {0.1: 10.0, 0.2: 30.0, 0.4: 40.0, math.inf: 50.0}
    assert quantile(0.5, counts) == pytest.approx(0.175)  # 15 of the 20 between 0.1 and 0.2
    assert quantile(0.1, counts) == pytest.approx(0.05)
    assert quantile(0.95, counts) == 0.4  # beyond the last bound nothing is known


def test_no_engine_is_a_sentence_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and does not listen
        assert top.run(parse("--port", str(nobody.getsockname()[1]), "--once")) == 1
    said = capsys.readouterr().err
    assert "Connection refused" in said
    assert "metrics_port" in said


def test_another_service_is_not_taken_for_an_engine(capsys: pytest.CaptureFixture[str]) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        assert top.run(parse("--port", str(server.server_port), "--once")) == 1
    finally:
        server.shutdown()
        server.server_close()
    assert "is not Tessera" in capsys.readouterr().err
