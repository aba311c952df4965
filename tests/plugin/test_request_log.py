"""The line in Dify's log: through the plugin's process with a fake engine behind it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.daemon import Daemon, PluginError
from models import _request_log
from models._request_log import RequestLog, failed_line

SECRET = "s3cr3t-words"


@pytest.fixture(scope="module")
def daemon(fake_plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One of its own: what it logs belongs to these tests alone."""
    with Daemon(fake_plugin, credentials={"storage": str(tmp_path_factory.mktemp("storage"))}) as running:
        yield running


def logged(daemon: Daemon, text: str, **options: Any) -> dict[str, Any]:
    """The one log event of one request, whatever becomes of it."""
    before = len(daemon.logs)
    with contextlib.suppress(PluginError):
        list(daemon.invoke_llm([{"role": "user", "content": text}], **options))
    deadline = time.monotonic() + 5
    while len(daemon.logs) == before and time.monotonic() < deadline:
        time.sleep(0.005)
    (event,) = daemon.logs[before:]
    return event


def fields(event: dict[str, Any]) -> dict[str, str]:
    word, *pairs = event["message"].split(" ")
    assert word == "request"
    return dict(pair.split("=", 1) for pair in pairs)


def test_an_answer_is_one_line_with_its_times_and_counts(daemon: Daemon) -> None:
    event = logged(daemon, "say 3 word")
    found = fields(event)
    assert event["level"] == "INFO"
    assert list(found) == [
        "model",
        "outcome",
        "prepare_ms",
        "queue_ms",
        "prefill_ms",
        "decode_ms",
        "total_ms",
        "prompt_tokens",
        "image_tokens",
        "reused_tokens",
        "output_tokens",
        "cache",
    ]
    assert (found["model"], found["outcome"], found["cache"]) == ("demo", "stop", "miss")
    counts = [found[f"{name}_tokens"] for name in ("prompt", "image", "reused", "output")]
    assert counts == ["7", "3", "0", "3"]
    assert float(found["total_ms"]) > 0


def test_an_answer_from_the_cache_says_so(daemon: Daemon) -> None:
    assert fields(logged(daemon, "hit"))["cache"] == "hit"


@pytest.mark.parametrize(
    ("text", "options", "error"),
    [
        ("fail QueueFull", {}, "QueueFull"),  # by the engine, before the first word
        ("break DeviceLost", {}, "DeviceLost"),  # after it
        (" ", {}, "InvalidRequest"),  # by what builds the engine's request
        ("say 1 word", {"parameters": {"temperature": 9}}, "InvokeBadRequestError"),  # by the SDK's check
        ("say 1 word", {"credentials": {"max_waiting": "many"}}, "InvalidConfig"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_whatever_keeps_a_request_from_an_answer_is_one_line_with_its_class(
    daemon: Daemon, stream: bool, text: str, options: dict[str, Any], error: str
) -> None:
    event = logged(daemon, text, stream=stream, **options)
    found = fields(event)
    assert event["level"] == "WARNING"
    assert list(found) == ["model", "outcome", "error", "total_ms"]
    assert (found["outcome"], found["error"]) == ("error", error)


def test_neither_question_nor_answer_nor_settings_nor_messages_are_logged(daemon: Daemon) -> None:
    credentials = daemon.credentials | {"storage": f"relative/{SECRET}"}
    url = f"https://example.org/{SECRET}.png"
    image = {"type": "image", "format": "png", "mime_type": "image/png", "url": url}
    question = [{"role": "user", "content": [image, {"type": "text", "data": SECRET}]}]
    for messages, settings in (
        ([{"role": "user", "content": f"say 2 {SECRET}"}], daemon.credentials),
        ([{"role": "user", "content": f"fail {SECRET}"}], daemon.credentials),
        (question, daemon.credentials),
        ([{"role": "user", "content": "say 1 word"}], credentials),
    ):
        before = len(daemon.logs)
        with contextlib.suppress(PluginError):
            list(daemon.invoke_llm(messages, credentials=settings, stop=[SECRET]))
        assert daemon.num_tokens([{"role": "user", "content": "one"}]) == 1  # whatever was logged has arrived
        assert len(daemon.logs) == before + 1
    assert SECRET not in str(daemon.logs)
    assert "request model" not in daemon.stderr_tail  # where every line would be a warning of the daemon's


def test_a_made_up_model_name_cannot_forge_a_line() -> None:
    line = failed_line('x outcome=stop\n{"event": "session"}' + "y" * 200, None, 0.0)
    assert line.count(" ") == 4
    assert "\n" not in line
    assert len(line) < 200


def test_a_reader_who_stops_is_a_cancelled_request() -> None:
    def answer() -> Generator[str]:
        with RequestLog("demo"):
            yield "so far"
            yield "never read"

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    _request_log.logger.addHandler(handler)
    try:
        reading = answer()
        next(reading)
        reading.close()
    finally:
        _request_log.logger.removeHandler(handler)
    (line,) = lines
    assert line.startswith("request model=demo outcome=error error=Cancelled total_ms=")
