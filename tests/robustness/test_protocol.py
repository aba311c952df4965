"""The daemon's rules under load: heartbeats on time, short lines, nothing but messages on stdout."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cli.daemon import Daemon
from tests.end_to_end.asking import about, picture, text_of
from tests.robustness.conftest import QUESTION, ROOT

STREAMS = 64
LATE_S = 1.0  # heartbeats every 10 s may come 11 s apart


@pytest.mark.parametrize(("interval_s", "seconds"), [(0.5, 4), pytest.param(10.0, 45, marks=pytest.mark.slow)])
def test_heartbeats_stay_on_time_while_64_streams_run_and_models_load(
    storage: Path, brought: Callable[[str], Path], interval_s: float, seconds: float
) -> None:
    """The engine starts and loads one model under the first requests, another one in the midst of the streams."""

    def stream(number: int) -> int:
        answered = 0
        while time.monotonic() < end:
            image = picture(color=f"#{number:02x}{answered % 256:02x}60", size=400)
            text = text_of(running.invoke_llm(about(image, QUESTION), {"max_tokens": 200, "ignore_eos": True}))
            assert len(text) > 100
            answered += 1
        return answered

    # settings of its own, so that the second model is loaded by this engine
    form = {"storage": str(storage), "cache_enabled": "false", "precision": "fp32"}
    brought(f"second-{seconds}")
    with Daemon(ROOT, env={"HEARTBEAT_INTERVAL": str(interval_s)}, credentials=form) as running:
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(STREAMS) as callers:
            streams = [callers.submit(stream, number) for number in range(STREAMS)]
            time.sleep(seconds / 2)
            second = running.invoke_llm(about(picture(), QUESTION), model=f"second-{seconds}")
            assert text_of(second).strip() == "circle"
            answered = sum(done.result() for done in streams)
        gap, longest = running.longest_heartbeat_gap, running.longest_line
        print(
            f"{answered} requests of {STREAMS} callers: heartbeats at most {gap:.2f} s apart (every {interval_s:g} s), "
        )
        print(f"the longest line {longest} bytes, {len(running.noise)} lines of noise")
        assert answered >= STREAMS
        assert gap < interval_s + LATE_S
        assert longest < 5 << 20
        assert running.noise == []
        assert running.errors == []


def test_large_images_and_long_texts_do_not_hold_up_the_heartbeat(plugin: Daemon) -> None:
    """As much as Dify lets through in one request: its limit for an image is 10 MB, its proxy's for a body 100 MB."""
    image = picture(size=64) + bytes(10 << 20)  # bytes after the last chunk of a PNG mean nothing
    (message,) = about(image, QUESTION)
    message["content"] = message["content"][:1] * 7 + message["content"][1:]
    text_of(plugin.invoke_llm([message], {"max_tokens": 4}))
    text_of(plugin.invoke_llm(about(image, QUESTION), {"max_tokens": 4}))
    print(f"heartbeats at most {plugin.longest_heartbeat_gap:.2f} s apart (every 0.5 s)")
    assert plugin.longest_heartbeat_gap < 11
