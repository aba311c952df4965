"""The plugin's process, started and spoken to as Dify's daemon does, with a fake engine behind it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dify_plugin  # noqa: F401 - test_this_process_is_not_patched_by_the_sdk
import gevent.monkey  # type: ignore[import-untyped]
import pytest

from cli.daemon import Daemon, PluginError

HEAVY = {"torch", "transformers", "onnxruntime", "numpy", "diskcache", "safetensors", "PIL"}


def asks(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def answer(daemon: Daemon, text: str, parameters: dict[str, Any] | None = None) -> str:
    return "".join(chunk["delta"]["message"]["content"] for chunk in daemon.invoke_llm(asks(text), parameters))


def test_an_answer_streams_and_ends_with_usage_and_reason(daemon: Daemon) -> None:
    *texts, last = daemon.invoke_llm(asks("say 3 word"))
    assert [chunk["delta"]["message"]["content"] for chunk in texts] == ["word "] * 3
    assert [chunk["delta"]["index"] for chunk in [*texts, last]] == [0, 1, 2, 3]
    assert all(chunk["delta"]["usage"] is None for chunk in texts)
    usage = last["delta"]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 3, 10)
    assert last["delta"]["finish_reason"] == "stop"
    assert last["delta"]["message"]["content"] == ""


def test_without_streaming_there_is_one_result(daemon: Daemon) -> None:
    (result,) = daemon.invoke_llm(asks("say 3 word"), stream=False)
    assert result["delta"]["message"]["content"] == "word word word "
    assert result["delta"]["usage"]["completion_tokens"] == 3


def test_the_engine_gets_the_request_as_dify_sent_it(daemon: Daemon) -> None:
    content = [
        {"type": "image", "format": "png", "mime_type": "image/png", "base64_data": "AAAA"},
        {"type": "text", "data": "echo"},
    ]
    chunks = daemon.invoke_llm(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}],
        {"temperature": 0.125, "max_tokens": 9, "ignore_eos": True, "unknown_elsewhere": 1},
        stop=["END"],
        credentials=daemon.credentials | {"precision": "fp32", "max_waiting": "7"},
    )
    asked = json.loads("".join(chunk["delta"]["message"]["content"] for chunk in chunks))
    assert asked["messages"] == [["system", ["be brief"]], ["user", [3, "echo"]]]
    sampling = asked["sampling"]
    assert (sampling["temperature"], sampling["max_tokens"], sampling["stop"]) == (0.125, 9, ["END"])
    assert sampling["ignore_eos"] is True
    assert (asked["settings"]["precision"], asked["settings"]["max_waiting"]) == ("fp32", 7)


def test_without_max_tokens_the_models_default_holds(daemon: Daemon) -> None:
    assert json.loads(answer(daemon, "echo"))["sampling"]["max_tokens"] == 128


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("InvalidImage", "InvokeBadRequestError"),
        ("QueueFull", "InvokeRateLimitError"),
        ("UnknownModel", "InvokeServerUnavailableError"),
    ],
)
@pytest.mark.parametrize("moment", ["fail", "break"])
def test_the_engines_error_reaches_dify_before_and_after_the_first_word(
    daemon: Daemon, moment: str, code: str, kind: str
) -> None:
    with pytest.raises(PluginError, match="this is why") as raised:
        answer(daemon, f"{moment} {code}")
    assert raised.value.kind == kind
    assert str(raised.value) == raised.value.details["description"] == "this is why"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": "warm"}, "temperature should be float"),
        ({"temperature": 9}, "temperature should be less than or equal to 2"),
        ({"max_tokens": 1.5}, "max_tokens should be int"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"min_p": float("nan")}, "min_p must be a number"),
        ({"ignore_eos": "yes"}, "ignore_eos should be bool"),
    ],
)
def test_a_wrong_parameter_is_a_bad_request_that_names_it(
    daemon: Daemon, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(PluginError, match=message) as raised:
        answer(daemon, "say 1 word", parameters)
    assert raised.value.kind == "InvokeBadRequestError"


def test_a_model_that_declares_nothing_gets_its_parameters_all_the_same(daemon: Daemon) -> None:
    chunks = daemon.invoke_llm(asks("echo"), {"max_tokens": 9}, model="brought")
    asked = json.loads("".join(chunk["delta"]["message"]["content"] for chunk in chunks))
    assert (asked["model"], asked["sampling"]["max_tokens"]) == ("brought", 9)


def test_a_wrong_setting_is_a_bad_request_that_names_it(daemon: Daemon) -> None:
    with pytest.raises(PluginError, match="max_waiting is 'many'") as raised:
        list(daemon.invoke_llm(asks("say 1 word"), credentials={"max_waiting": "many"}))
    assert raised.value.kind == "InvokeBadRequestError"


def test_tokens_are_counted(daemon: Daemon) -> None:
    assert daemon.num_tokens(asks("one two three")) == 3
    assert daemon.num_tokens(asks("")) == 0


def test_the_schema_declares_vision(daemon: Daemon) -> None:
    assert daemon.schema()["model_schema"]["features"] == ["vision", "structured-output"]


def test_the_form_is_validated_without_the_engine(daemon: Daemon, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    assert daemon.validate_provider({"storage": str(folder), "precision": "int8"})["result"] is True
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"storage": "relative"}, "absolute path"),
        ({"storage": "/proc/tessera"}, "/proc/tessera cannot be used"),
        ({"max_waiting": "many"}, "max_waiting"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"colour": "red"}, "unknown setting 'colour'"),
    ],
)
def test_a_wrong_form_is_refused_by_name(daemon: Daemon, settings: dict[str, str], message: str) -> None:
    with pytest.raises(PluginError, match=message) as raised:
        daemon.validate_provider(settings)
    assert raised.value.kind == "CredentialsValidateFailedError"


def test_nothing_that_python_or_c_prints_reaches_the_protocol(daemon: Daemon) -> None:
    assert answer(daemon, "noise") == "quiet"
    assert daemon.noise == []
    deadline = time.monotonic() + 5
    while "printed by C" not in daemon.stderr_tail and time.monotonic() < deadline:
        time.sleep(0.01)
    for text in ("printed by Python", "written to fd 1", "printed by C"):
        assert text in daemon.stderr_tail


def test_the_protocol_process_imports_nothing_heavy(daemon: Daemon) -> None:
    names = {name.partition(".")[0] for name in json.loads(answer(daemon, "modules"))}
    assert not names & HEAVY
    mapped = Path(f"/proc/{daemon.pid}/maps").read_text(encoding="utf-8")
    assert not [name for name in ("torch", "onnxruntime") if name in mapped]


def test_many_streams_at_once_get_their_own_words(daemon: Daemon) -> None:
    def ask(number: int) -> str:
        return answer(daemon, f"say 40 word{number}")

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    assert answers == [f"word{number} " * 40 for number in range(64)]
    assert daemon.noise == []


def test_the_real_engine_is_not_started_by_starting_the_plugin(fake_plugin: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    with Daemon(root) as running:
        assert running.manifest["name"] == "tessera"
        assert running.schema()["model_schema"]["model"] == "demo"
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text(encoding="ascii").split()
    assert children == []


def test_this_process_is_not_patched_by_the_sdk() -> None:
    assert not gevent.monkey.is_anything_patched()


def test_the_plugin_ends_with_its_daemon(fake_plugin: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "main"],
        cwd=fake_plugin,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin
    process.stdin.close()
    assert process.wait(20) == 0


def test_the_marketplaces_install_test_passes(fake_plugin: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "main"],
        cwd=fake_plugin,
        env=os.environ | {"INSTALL_METHOD": "serverless", "SERVERLESS_PORT": str(port), "SERVERLESS_HOST": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        assert any("Serving Flask app" in line for line in lines)
        assert any("Running on" in line for line in lines)
        assert _fetch(f"http://127.0.0.1:{port}/health") == "OK"
    finally:
        process.kill()
        process.wait()


def _fetch(url: str) -> str:
    deadline = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return str(response.read().decode())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
