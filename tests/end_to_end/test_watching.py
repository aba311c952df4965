"""Metrics and `top` of the real plugin, while it runs."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cli.daemon import Daemon
from tests.end_to_end.asking import about, picture, text_of

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def top(port: int, *words: str) -> str:
    command = [sys.executable, "-m", "cli", "top", "--once", "--interval", "0.2", "--port", str(port), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_top_tells_what_a_running_engine_did_and_a_second_engine_goes_on_without_the_port(tmp_path: Path) -> None:
    port = free_port()
    settings = {"storage": str(tmp_path), "metrics_port": str(port)}
    with Daemon(ROOT, credentials=settings) as first, Daemon(ROOT, credentials=settings) as second:
        question = about(picture(), "what shape is in the image?")
        usages: list[dict[str, Any]] = []
        for _ in range(2):
            *_, last = first.invoke_llm(question, {"max_tokens": 6, "ignore_eos": True})
            usages.append(last["delta"]["usage"])
        told = json.loads(top(port, "--json"))
        assert told["requests"] == {"open": 0, "ended": 2, "failed": 0, "per_s": 0}
        assert told["caches"]["answers"] == {"queries": 2, "hits": 1}
        assert told["caches"]["prefix"]["queries"] == usages[0]["prompt_tokens"]
        assert told["latency_s"]["ttft"]["mean"] > 0 < told["latency_s"]["tpot"]["mean"]
        assert [replica["model"] for replica in told["replicas"]] == ["demo"]
        assert told["replicas"][0]["memory_bytes"]["weights"] > 1 << 20
        assert "demo" in top(port)

        assert text_of(second.invoke_llm(question)).strip() == "circle"
        deadline = time.monotonic() + 10
        while "metrics are not served yet" not in second.stderr_tail and time.monotonic() < deadline:
            time.sleep(0.02)
        assert f"port {port} of 127.0.0.1 cannot be had (Address already in use)" in second.stderr_tail
