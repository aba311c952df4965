"""The whole way: Dify's request for a model that is at the hub only."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cli.daemon import Daemon, PluginError
from engine.catalog import ROOT
from tests.end_to_end.asking import text_of
from tests.hub.conftest import demo_repository
from tests.hub.stand_in import HubStandIn

NAME = "someone/demo"
HELLO = [{"role": "user", "content": "hello"}]


def test_a_request_is_told_how_far_the_download_is_or_why_not_and_answered_when_it_is_over(
    hub: HubStandIn, tmp_path: Path
) -> None:
    hub.repositories[NAME] = demo_repository()
    hub.token = "hf_secret"
    hub.faults.pause_s = 0.05
    form = {"storage": str(tmp_path), "hub_endpoint": hub.address, "hub_token": "hf_secret", "download_wait_s": "1"}
    with Daemon(ROOT, credentials=form) as plugin:
        plugin.validate_provider(form)
        assert not hub.requests, "the form's check asks no hub"
        with pytest.raises(PluginError, match=r"downloading demo: .* try again") as refused:
            list(plugin.invoke_llm(HELLO, {"max_tokens": 4}, model=NAME))
        assert refused.value.kind == "InvokeRateLimitError"
        assert "hf_secret" not in str(refused.value)
        with pytest.raises(PluginError, match="someone/missing") as refused:
            list(plugin.invoke_llm(HELLO, model="someone/missing"))
        assert refused.value.kind == "InvokeServerUnavailableError"
        hub.faults.pause_s = 0.0
        while not (tmp_path / "models" / "someone--demo").exists():
            time.sleep(0.05)
        assert text_of(list(plugin.invoke_llm(HELLO, {"max_tokens": 4}, model=NAME)))
    assert hub.asked()["model.safetensors"] == 1
