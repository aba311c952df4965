"""The provider's form, saved: what Dify shows when it is wrong, and what its log says when it is fine."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cli.daemon import Daemon, PluginError

TOKEN = "hf_secret"


def test_what_was_found_is_one_line_of_the_log(daemon: Daemon, tmp_path: Path) -> None:
    before = len(daemon.logs)
    form = {"storage": str(tmp_path), "device": "cpu", "hub_token": TOKEN}
    assert daemon.validate_provider(form)["result"] is True
    deadline = time.monotonic() + 5
    while len(daemon.logs) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    (event,) = daemon.logs[before:]
    for words in (f"storage: {tmp_path}, ", "MiB free; compiler: ", "; device: the CPU"):
        assert words in str(event)
    assert TOKEN not in str(daemon.logs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:7"}, "CUDA was asked for, but"),
        ({"storage": "/proc/tessera"}, "/proc/tessera cannot be used"),
        ({"hub_endpoint": f"https://user:{TOKEN}@huggingface.co"}, "hub_endpoint must not hold a user or password"),
        ({"hub_token": f"{TOKEN} "}, ""),
    ],
)
def test_what_is_wrong_is_a_sentence_without_the_token(
    daemon: Daemon, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    form = {"storage": str(tmp_path), "hub_token": TOKEN} | settings
    if not message:  # a space at the end is what copying brings along
        assert daemon.validate_provider(form)["result"] is True
        return
    with pytest.raises(PluginError, match=message) as raised:
        daemon.validate_provider(form)
    assert raised.value.kind == "CredentialsValidateFailedError"
    assert TOKEN not in str(raised.value)


def test_others_are_answered_while_a_form_is_checked(daemon: Daemon, tmp_path: Path) -> None:
    """The check waits for a process; a greenlet that blocked would hold up every stream and the heartbeat."""
    check = daemon._model_request("validate_model_credentials", "demo", {"storage": str(tmp_path)})
    with ThreadPoolExecutor(4) as pool:
        checks = [pool.submit(daemon.ask, check) for _ in range(4)]
        assert daemon.num_tokens([{"role": "user", "content": "one two"}]) == 2
        assert [check.result()["result"] for check in checks] == [True] * 4
