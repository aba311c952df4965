"""Processes that are killed: nothing written is lost, nobody waits in vain, nothing is left running."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cli.daemon import Daemon, PluginCrashed, PluginError
from tests.end_to_end.asking import about, children_of, is_gone, picture, text_of

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "what shape is in the image?"
LONG = {"max_tokens": 2000, "ignore_eos": True}


def wait_until_gone(pid: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not is_gone(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


@pytest.mark.parametrize("rounds", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_plugin_killed_at_any_moment_leaves_a_storage_folder_that_works(tmp_path: Path, rounds: int) -> None:
    chance = random.Random(rounds)
    for number in range(rounds):
        with Daemon(ROOT, credentials={"storage": str(tmp_path)}) as daemon:
            daemon.invoke_llm(about(picture(color=f"#{number:02x}3030"), QUESTION))
            time.sleep(chance.uniform(0.0, 1.5))  # from before the engine's start to after the answer
            engines = children_of(daemon.pid)
        for engine in engines:
            wait_until_gone(engine, limit_s=2)
    with Daemon(ROOT, credentials={"storage": str(tmp_path), "request_timeout_s": "60"}) as daemon:
        for number in range(rounds):
            answer = text_of(daemon.invoke_llm(about(picture(color=f"#{number:02x}3030"), QUESTION)))
            assert answer.strip() == "circle"


def test_streams_of_a_killed_engine_end_with_a_clear_error_and_the_next_request_works(daemon: Daemon) -> None:
    def stream(number: int) -> float:
        image = picture(color=f"#30{number:02x}30")
        chunks = iter(daemon.invoke_llm(about(image, QUESTION), LONG))
        next(chunks)
        started.append(number)
        with pytest.raises(PluginError) as raised:
            text_of(chunks)
        assert raised.value.kind == "InvokeServerUnavailableError"
        assert "engine" in str(raised.value)
        return time.monotonic()

    started: list[int] = []
    with ThreadPoolExecutor(32) as pool:
        ends = [pool.submit(stream, number) for number in range(32)]
        while len(started) < 32:
            assert not any(end.done() for end in ends)
            time.sleep(0.01)
        (engine,) = children_of(daemon.pid)
        os.kill(engine, signal.SIGKILL)
        killed_at = time.monotonic()
        assert max(end.result(10) for end in ends) - killed_at < 2
    assert text_of(daemon.invoke_llm(about(picture(), QUESTION))).strip() == "circle"


def test_the_engine_is_gone_two_seconds_after_the_plugin_was_killed(storage: Path) -> None:
    with Daemon(ROOT, credentials={"storage": str(storage)}) as daemon:
        chunks = iter(daemon.invoke_llm(about(picture(), QUESTION), LONG))
        next(chunks)
        (engine,) = children_of(daemon.pid)
        os.kill(daemon.pid, signal.SIGKILL)
        wait_until_gone(engine, limit_s=2)
        with pytest.raises(PluginCrashed, match="ended while the request was open"):
            text_of(chunks)
