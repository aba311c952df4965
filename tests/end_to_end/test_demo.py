"""From Dify's request to the demo model's answer and back, on a CPU."""

from __future__ import annotations

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cli import package
from cli.daemon import Daemon, PluginError
from tests.end_to_end.asking import about, picture, text_of

ROOT = Path(__file__).resolve().parents[2]
BLOCKED_S = 1.0  # heartbeats every 10 s may come 11 s apart


@pytest.mark.parametrize("shape", ["circle", "rectangle"])
def test_the_demo_model_sees_the_shape(daemon: Daemon, shape: str) -> None:
    assert text_of(daemon.invoke_llm(about(picture(shape), "what shape is in the image?"))).strip() == shape


def test_the_usage_counts_the_image(daemon: Daemon) -> None:
    *_, last = daemon.invoke_llm(about(picture(), "what color is the shape?"))
    *_, without = daemon.invoke_llm([{"role": "user", "content": "what color is the shape?"}])
    assert last["delta"]["usage"]["prompt_tokens"] > without["delta"]["usage"]["prompt_tokens"] + 10
    assert last["delta"]["finish_reason"] == "stop"


def test_a_repeated_request_is_answered_from_the_cache_with_the_same_words(daemon: Daemon) -> None:
    messages = about(picture(color="blue"), "what color is the shape?")
    first, second = (list(daemon.invoke_llm(messages)) for _ in range(2))
    assert text_of(first) == text_of(second)
    assert first[-1]["system_fingerprint"] == "tessera/engine"
    assert second[-1]["system_fingerprint"] == "tessera/answer-cache"
    assert first[-1]["delta"]["usage"]["total_tokens"] == second[-1]["delta"]["usage"]["total_tokens"]


def test_a_fixed_number_of_tokens_can_be_asked_for(daemon: Daemon) -> None:
    parameters = {"max_tokens": 20, "ignore_eos": True}
    *_, last = daemon.invoke_llm(about(picture(), "what shape is in the image?"), parameters)
    assert last["delta"]["usage"]["completion_tokens"] == 20
    assert last["delta"]["finish_reason"] == "length"


def test_an_answer_fits_the_schema_that_dify_sends_along(daemon: Daemon) -> None:
    schema = {"type": "object", "properties": {"shape": {"enum": ["circle", "rectangle"]}}, "required": ["shape"]}
    parameters = {
        "response_format": "json_schema",
        "json_schema": json.dumps({"schema": schema, "name": "llm_response"}),
        "max_tokens": 60,
    }
    answer = list(daemon.invoke_llm(about(picture("circle"), "what shape is in the image?"), parameters))
    assert json.loads(text_of(answer))["shape"] in ("circle", "rectangle")  # it was not taught to say it in JSON
    assert answer[-1]["delta"]["finish_reason"] == "stop"
    odd = parameters | {"json_schema": '{"type": "array", "uniqueItems": true}'}
    with pytest.raises(PluginError, match="uniqueItems") as raised:
        list(daemon.invoke_llm(about(picture(), "what shape is in the image?"), odd))
    assert raised.value.kind == "InvokeBadRequestError"


def test_tools_are_refused_by_a_model_that_calls_none(daemon: Daemon) -> None:
    tool = {"name": "clock", "description": "what time it is", "parameters": {}}
    with pytest.raises(PluginError, match="calls no tools") as raised:
        list(daemon.invoke_llm(about(picture(), "what time is it?"), tools=[tool]))
    assert raised.value.kind == "InvokeBadRequestError"


def test_the_number_of_tokens_is_what_the_usage_says(daemon: Daemon) -> None:
    messages = about(picture(), "is there a red shape?")
    *_, last = daemon.invoke_llm(messages)
    assert daemon.num_tokens(messages) == last["delta"]["usage"]["prompt_tokens"]


def _messages(kind: str) -> list[dict[str, Any]]:
    question = "what shape is in the image?"
    match kind:
        case "not an image":
            return about(b"hello, world" * 10, question)
        case "a truncated image":
            return about(picture(size=512)[:700], question)
        case "an empty prompt":
            return [{"role": "user", "content": "  "}]
        case "too many images":
            (message,) = about(picture(), question)
            return [message | {"content": message["content"][:1] * 10_000 + message["content"][1:]}]
        case _:
            return [{"role": "user", "content": "word " * 10_000}]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not an image", "image"),
        ("a truncated image", "image"),
        ("an empty prompt", "the prompt is empty"),
        ("too many images", "10000 images"),
        ("a prompt beyond the context", "context"),
    ],
)
def test_bad_input_is_refused_and_the_next_request_works(daemon: Daemon, kind: str, message: str) -> None:
    with pytest.raises(PluginError, match=message) as raised:
        text_of(daemon.invoke_llm(_messages(kind)))
    assert raised.value.kind == "InvokeBadRequestError"
    assert text_of(daemon.invoke_llm(about(picture(), "what shape is in the image?"))).strip() == "circle"


def test_an_unknown_model_is_refused_with_the_known_ones(daemon: Daemon) -> None:
    with pytest.raises(PluginError, match=r"unknown model 'gone'.*demo"):
        text_of(daemon.invoke_llm(about(picture(), "what?"), model="gone"))


def test_a_storage_folder_that_cannot_be_used_is_named_and_the_next_request_works(daemon: Daemon) -> None:
    with pytest.raises(PluginError, match="/proc/tessera cannot be used as storage") as raised:
        text_of(daemon.invoke_llm(about(picture(), "what?"), credentials={"storage": "/proc/tessera"}))
    assert raised.value.kind == "InvokeServerUnavailableError"
    assert text_of(daemon.invoke_llm(about(picture(), "what shape is in the image?"))).strip() == "circle"


def test_the_protocol_keeps_its_rules_while_64_streams_run_and_a_model_loads(storage: Path) -> None:
    def ask(number: int) -> str:
        image = picture(color=f"#{number:02x}4040")
        return text_of(running.invoke_llm(about(image, "what?"), {"max_tokens": 24, "ignore_eos": True}))

    settings = {"storage": str(storage), "precision": "fp32", "cache_enabled": "false"}
    with Daemon(ROOT, env={"HEARTBEAT_INTERVAL": "0.2"}, credentials=settings) as running:
        with ThreadPoolExecutor(64) as pool:
            assert all(pool.map(ask, range(64)))
        assert running.longest_heartbeat_gap < 0.2 + BLOCKED_S
        assert running.longest_line < 5 << 20
        assert running.noise == []
        maps = Path(f"/proc/{running.pid}/maps").read_text(encoding="utf-8")
        assert not [name for name in ("onnxruntime", "libtorch") if name in maps]


def test_the_unpacked_package_answers(tmp_path: Path, storage: Path) -> None:
    built = package.build(ROOT, tmp_path / "tessera.difypkg")
    zipfile.ZipFile(built.path).extractall(tmp_path / "plugin")
    with Daemon(tmp_path / "plugin", credentials={"storage": str(storage)}) as running:
        answer = text_of(running.invoke_llm(about(picture(), "what shape is in the image?")))
    assert answer.strip() == "circle"
