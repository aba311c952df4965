"""What an engine's metrics count, scraped over HTTP as Prometheus does."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from engine.config import EngineConfig
from engine.errors import EngineError, InvalidConfig
from engine.metrics import Metrics, MetricsServer
from engine.stats import StepRecord
from tests.engine.asking import Answer, ask, picture, request
from tests.engine.conftest import Start

Samples = dict[str, float]  # 'name{label="value",...}' -> value
DEMO = 'model_name="demo"'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        return {_key(sample.name, sample.labels): sample.value for family in families for sample in family.samples}


def _key(name: str, labels: dict[str, str]) -> str:
    pairs = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{pairs}}}" if pairs else name


def scraped(port: int, holds: Callable[[Samples], bool] = bool) -> Samples:
    """A scrape, once it can be had and `holds`: a server starts and a count follows behind the request's back."""
    deadline = time.monotonic() + 10
    while True:
        try:
            samples = scrape(port)
        except OSError:
            samples = {}
        if holds(samples) or time.monotonic() > deadline:
            return samples
        time.sleep(0.01)


def requests_of(samples: Samples) -> Samples:
    return {key: value for key, value in samples.items() if key.startswith("tessera_requests_total")}


def test_the_scraped_counts_are_those_of_the_requests(start: Start) -> None:
    port = free_port()
    engine = start(metrics_port=port, cache_enabled=True)
    questions = [request(picture(seed), "what shape?", max_tokens=5, ignore_eos=True) for seed in (9101, 9102, 9103)]
    answers = [ask(engine, question).wait() for question in [*questions, questions[0]]]
    assert all(answer.finished for answer in answers)
    ended = answers[0].finished.usage.prompt_tokens  # type: ignore[union-attr]
    with pytest.raises(EngineError):
        ask(engine, request("what?", model="not-there"))
    with pytest.raises(EngineError):
        ask(engine, request("word " * 10_000)).wait().text  # noqa: B018 - raises
    samples = scraped(port, lambda found: sum(requests_of(found).values()) == 6)
    assert requests_of(samples) == {
        f'tessera_requests_total{{{DEMO},outcome="length"}}': 4,
        f'tessera_requests_total{{{DEMO},outcome="ContextOverflow"}}': 1,
        'tessera_requests_total{model_name="",outcome="UnknownModel"}': 1,
    }
    computed = [answer.finished.usage for answer in answers[:3] if answer.finished]
    for name, expected in (
        ("prompt_tokens_total", sum(usage.prompt_tokens for usage in computed)),
        ("image_tokens_total", sum(usage.image_tokens for usage in computed)),
        ("prefix_cache_hits_total", sum(usage.reused_tokens for usage in computed)),
        ("generation_tokens_total", 15),
        ("prefill_tokens_total", sum(usage.prompt_tokens - usage.reused_tokens for usage in computed)),
        ("time_to_first_token_seconds_count", 3),
        ("time_per_output_token_seconds_count", 3),
        ("e2e_request_latency_seconds_count", 3),
        ("request_queue_time_seconds_count", 3),
    ):
        assert samples[f"tessera_{name}{{{DEMO}}}"] == expected, name
    assert ended == computed[0].prompt_tokens
    for cache, lookups, hits in (("answers", 4, 1), ("features", 3, 0)):
        labels = f'cache="{cache}",{DEMO}'
        assert samples[f"tessera_cache_queries_total{{{labels}}}"] == lookups
        assert samples[f"tessera_cache_hits_total{{{labels}}}"] == hits
    on_cpu = f'device="cpu",{DEMO}'
    assert samples[f"tessera_step_seconds_count{{{on_cpu}}}"] >= 15
    assert samples["tessera_models_loaded"] == 1
    assert samples["tessera_open_requests"] == samples[f"tessera_num_requests_running{{{on_cpu}}}"] == 0
    assert samples[f"tessera_kv_blocks{{{on_cpu}}}"] >= samples[f"tessera_kv_blocks_indexed{{{on_cpu}}}"] > 0
    assert samples[f'tessera_memory_bytes{{device="cpu",kind="weights",{DEMO}}}'] > 1 << 20
    assert samples["process_resident_memory_bytes"] > 1 << 20


def test_identical_requests_at_once_are_two_requests_and_one_computation(start: Start) -> None:
    port = free_port()
    engine = start(metrics_port=port, cache_enabled=True)
    engine.load("demo")
    question = request(picture(9104), "what?", max_tokens=40, ignore_eos=True)
    answers: list[Answer] = [ask(engine, question) for _ in range(4)]
    for answer in answers:
        answer.wait()
    samples = scraped(port, lambda found: sum(requests_of(found).values()) == 4)
    hits = samples[f'tessera_cache_hits_total{{cache="answers",{DEMO}}}']
    assert samples[f"tessera_generation_tokens_total{{{DEMO}}}"] == 40
    assert samples[f"tessera_e2e_request_latency_seconds_count{{{DEMO}}}"] == 1
    assert hits < 4


def test_what_runs_and_waits_is_seen_while_it_does(start: Start) -> None:
    port = free_port()
    engine = start(metrics_port=port, max_batch_size=1)
    questions = [request(f"what {number}?", max_tokens=5000, ignore_eos=True, temperature=1.0) for number in range(3)]
    answers = [ask(engine, question) for question in questions]
    on_cpu = f'device="cpu",{DEMO}'

    def is_busy(samples: Samples) -> bool:
        return samples.get(f"tessera_num_requests_waiting{{{on_cpu}}}") == 2

    samples = scraped(port, is_busy)
    assert is_busy(samples)
    assert samples[f"tessera_num_requests_running{{{on_cpu}}}"] == 1
    assert samples["tessera_open_requests"] == 3
    assert samples[f"tessera_kv_blocks_used{{{on_cpu}}}"] > 0
    for answer in answers:
        assert answer.stream is not None
        answer.stream.cancel()
    assert scraped(port, lambda found: found.get("tessera_open_requests") == 0)["tessera_open_requests"] == 0
    assert requests_of(scraped(port, lambda found: bool(requests_of(found)))) == {
        f'tessera_requests_total{{{DEMO},outcome="Cancelled"}}': 3
    }


def test_the_second_engine_of_a_port_says_so_and_works(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    first = MetricsServer(port, CollectorRegistry())
    try:
        _wait_until(lambda: _accepts(port))
        with caplog.at_level(logging.WARNING, "engine.metrics"):
            second = start(metrics_port=port)
            assert ask(second, request("what?", max_tokens=2)).wait().finished
            _wait_until(lambda: bool(_lines(caplog)))
        (line,) = _lines(caplog)
        assert f"port {port} of 127.0.0.1 cannot be had" in line
        assert "metrics_port" in line
    finally:
        first.close()


def test_a_port_that_is_given_up_is_taken_over() -> None:
    port = free_port()
    first = MetricsServer(port, CollectorRegistry(), retry_s=0.01)
    second = None
    try:
        registry = Metrics(lambda: {"open_requests": 0, "models": {}}).registry
        _wait_until(lambda: _accepts(port))
        second = MetricsServer(port, registry, retry_s=0.01)
        first.close()
        assert scraped(port, lambda found: "tessera_open_requests" in found)["tessera_open_requests"] == 0
    finally:
        first.close()
        if second is not None:
            second.close()
    assert not _accepts(port)


def _wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "engine.metrics"]


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_only_this_machine_can_ask(start: Start) -> None:
    port = free_port()
    start(metrics_port=port)
    scraped(port)
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    listening = [local for _, local, _, state, *_ in sockets if state == "0A"]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening


def test_overlapping_steps_are_counted_from_the_end_of_the_one_before() -> None:
    metrics = Metrics(lambda: {"open_requests": 0, "models": {}})
    record: dict[str, Any] = {"host_s": 0.1, "decode_rows": 1, "context_tokens": 1, "prefill_tokens": 2, "images": 0}
    metrics.on_step(StepRecord("m", 10.0, 12.0, tokens_out=1, device="cuda:0", **record))
    metrics.on_step(StepRecord("m", 11.0, 13.5, tokens_out=1, device="cuda:0", **record))
    labels = {"model_name": "m", "device": "cuda:0"}
    assert metrics.registry.get_sample_value("tessera_step_seconds_sum", labels) == pytest.approx(3.5)
    assert metrics.registry.get_sample_value("tessera_prefill_tokens_total", {"model_name": "m"}) == 4


def test_an_engine_without_metrics_never_imports_prometheus() -> None:
    code = (
        "import sys, tempfile, pathlib; from engine.engine import Engine; from engine.config import EngineConfig;"
        "Engine(EngineConfig(storage=pathlib.Path(tempfile.mkdtemp()))).close();"
        "sys.exit('prometheus_client' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("port", ["-1", "65536", "many", "9464.5"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(InvalidConfig, match="metrics_port"):
        EngineConfig.from_mapping({"metrics_port": port})
