"""The line in Dify's log of requests that the real engine answered or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli.daemon import Daemon, PluginError
from tests.end_to_end.asking import about, picture, text_of


def lines_of(daemon: Daemon, before: int) -> list[dict[str, str]]:
    return [dict(pair.split("=", 1) for pair in log["message"].split(" ")[1:]) for log in daemon.logs[before:]]


def test_the_line_tells_what_dify_was_told_and_where_the_time_went(daemon: Daemon) -> None:
    before = len(daemon.logs)
    image, question = picture("rectangle", "#123456"), "what shape is in the image?"
    usages: list[dict[str, Any]] = []
    for _ in range(2):
        *_, last = daemon.invoke_llm(about(image, question))
        usages.append(last["delta"]["usage"])
    computed, kept = lines_of(daemon, before)
    for line, usage in zip((computed, kept), usages, strict=True):
        assert (line["model"], line["outcome"]) == ("demo", "stop")
        assert int(line["prompt_tokens"]) == usage["prompt_tokens"]
        assert int(line["output_tokens"]) == usage["completion_tokens"]
        assert 0 < int(line["image_tokens"]) < int(line["prompt_tokens"])
        parts = sum(float(line[f"{part}_ms"]) for part in ("prepare", "queue", "prefill", "decode"))
        assert parts <= float(line["total_ms"]) + 0.5  # each is rounded
    assert float(computed["prefill_ms"]) > 0 < float(computed["decode_ms"])
    assert (computed["cache"], kept["cache"]) == ("miss", "hit")
    assert (kept["queue_ms"], kept["prefill_ms"], kept["decode_ms"]) == ("0.0", "0.0", "0.0")


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        (about(b"hello, world" * 10, "what?"), {}, "InvalidImage"),
        ([{"role": "user", "content": "word " * 10_000}], {}, "ContextOverflow"),
        ([{"role": "user", "content": "what?"}], {"model": "gone"}, "UnknownModel"),
        ([{"role": "user", "content": "what?"}], {"credentials": {"storage": "/proc/tessera"}}, "StorageError"),
    ],
)
def test_an_error_of_the_engine_is_named_by_its_class_alone(
    daemon: Daemon, messages: list[dict[str, Any]], options: dict[str, Any], error: str
) -> None:
    before = len(daemon.logs)
    with pytest.raises(PluginError):
        text_of(daemon.invoke_llm(messages, **options))
    (line,) = lines_of(daemon, before)
    assert list(line) == ["model", "outcome", "error", "total_ms"]
    assert line["error"] == error


def test_no_word_and_no_byte_of_a_request_is_in_the_log_or_on_stderr(daemon: Daemon, storage: Path) -> None:
    question = "what color is the zebrawordthatisnowhere?"
    image = about(picture(color="purple"), question)
    text_of(daemon.invoke_llm(image, stop=["quaggaword"]))
    written = str(daemon.logs) + daemon.stderr_tail
    data = image[0]["content"][0]["base64_data"]
    assert not [secret for secret in ("zebraword", "quaggaword", data[:40], str(storage)) if secret in written]
