"""Add Model: a repository's name or a folder is all that people type; the rest is read from the checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.daemon import Daemon, PluginError
from engine.catalog import ROOT
from tests.hub.conftest import NAME, tiny_repository
from tests.hub.stand_in import HubStandIn
from tests.prompts.tool_templates import JSON_TOOLS

Form = dict[str, str]


@pytest.fixture
def form(tmp_path: Path) -> Form:
    return {"storage": str(tmp_path / "storage"), "device": "cpu", "hub_endpoint": "off"}


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn({NAME: tiny_repository()}) as hub:
        yield hub


def ask(daemon: Daemon, action: str, model: str, form: Form) -> dict[str, Any]:
    return daemon.ask(daemon._model_request(action, model, form))


def schema_of(daemon: Daemon, model: str, form: Form) -> Any:
    return ask(daemon, "get_ai_model_schemas", model, form)["model_schema"]


def validate(daemon: Daemon, model: str, form: Form) -> None:
    assert ask(daemon, "validate_model_credentials", model, form)["result"] is True


def bring(folder: Path, **changes: Any) -> Path:
    """The demo's configuration, changed, without its weights."""
    folder.mkdir(parents=True)
    config = json.loads((ROOT / "demo" / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_folder_of_the_storage_goes_by_its_name(daemon: Daemon, form: Form) -> None:
    bring(Path(form["storage"]) / "models" / "mine")
    validate(daemon, "mine", form)
    schema = schema_of(daemon, "mine", form)
    assert schema["model"] == "mine"
    assert schema["label"]["en_us" if "en_us" in schema["label"] else "en_US"] == "mine"
    assert schema["fetch_from"] == "customizable-model"
    assert schema["features"] == ["vision", "structured-output"]
    assert schema["model_properties"] == {"mode": "chat", "context_size": 4096}


def test_its_form_may_be_empty_altogether(daemon: Daemon, tmp_path: Path) -> None:
    path = str(bring(tmp_path / "mine"))
    assert schema_of(daemon, path, {})["model_properties"]["context_size"] == 4096


def test_a_folder_elsewhere_goes_by_its_path(daemon: Daemon, form: Form, tmp_path: Path) -> None:
    path = str(bring(tmp_path / "elsewhere" / "mine"))
    validate(daemon, path, form)
    assert schema_of(daemon, path, form)["model_properties"]["context_size"] == 4096


def test_what_the_model_can_do_is_read_and_not_typed(daemon: Daemon, form: Form) -> None:
    folder = Path(form["storage"]) / "models" / "text"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "max_position_embeddings": 40960}))
    validate(daemon, "text", form)
    schema = schema_of(daemon, "text", form)
    assert "vision" not in schema["features"]
    assert schema["model_properties"]["context_size"] == 40960


def test_its_template_says_whether_it_calls_tools_and_thinks(daemon: Daemon, form: Form) -> None:
    folder = bring(Path(form["storage"]) / "models" / "mine")
    (folder / "chat_template.jinja").write_text(JSON_TOOLS)
    schema = schema_of(daemon, "mine", form)
    assert {"tool-call", "multi-tool-call", "stream-tool-call"} <= set(schema["features"])
    switch = schema["parameter_rules"][-1]
    assert (switch["name"], switch["type"], switch["use_template"]) == ("enable_thinking", "boolean", None)


def test_the_parameters_are_those_of_the_predefined_models(daemon: Daemon, form: Form) -> None:
    bring(Path(form["storage"]) / "models" / "mine")
    rules = {rule["name"]: rule for rule in schema_of(daemon, "mine", form)["parameter_rules"]}
    predefined = {rule["name"]: rule for rule in daemon.schema()["model_schema"]["parameter_rules"]}
    assert rules.keys() == predefined.keys()
    for name, rule in rules.items():
        bounds = {"max", "default"} if name == "max_tokens" else set()
        same = rule.keys() - bounds - {"use_template"}
        assert {key: rule[key] for key in same} == {key: predefined[name][key] for key in same}
    assert (rules["max_tokens"]["max"], rules["max_tokens"]["default"]) == (4096, 1024)


def test_its_parameters_are_checked_as_the_predefined_models(daemon: Daemon, form: Form) -> None:
    bring(Path(form["storage"]) / "models" / "mine")
    messages = [{"role": "user", "content": "echo"}]
    chunks = list(daemon.invoke_llm(messages, {"temperature": 0.125}, model="mine", credentials=form))
    asked = json.loads("".join(chunk["delta"]["message"]["content"] for chunk in chunks))
    assert (asked["model"], asked["sampling"]["temperature"]) == ("mine", 0.125)
    assert asked["sampling"]["max_tokens"] == 1024
    with pytest.raises(PluginError, match="temperature should be less than or equal to 2"):
        list(daemon.invoke_llm(messages, {"temperature": 9}, model="mine", credentials=form))


def test_a_repository_is_described_by_its_hub_and_nothing_large_is_fetched(
    daemon: Daemon, form: Form, hub: HubStandIn
) -> None:
    form |= {"hub_endpoint": hub.address}
    assert schema_of(daemon, NAME, form) is None
    assert not hub.requests
    started = time.monotonic()
    validate(daemon, NAME, form)
    assert time.monotonic() - started < 30
    schema = schema_of(daemon, NAME, form)
    assert (schema["features"], schema["model_properties"]["context_size"]) == (["vision", "structured-output"], 4096)
    assert not [name for name in hub.asked() if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "unknown model 'nothing'; known models: demo"),
        ("/nothing/here", "unknown model '/nothing/here'"),
        ("../..", r"unknown model '\.\./\.\.'"),
        ("owner/name", "downloads are off"),
        ("owner/name/more", "unknown model"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_do(daemon: Daemon, form: Form, model: str, message: str) -> None:
    with pytest.raises(PluginError, match=message) as raised:
        validate(daemon, model, form)
    assert raised.value.kind == "CredentialsValidateFailedError"
    assert schema_of(daemon, model, form) is None


def test_a_repository_that_the_hub_does_not_know_is_refused(daemon: Daemon, form: Form, hub: HubStandIn) -> None:
    with pytest.raises(PluginError, match="check the spelling"):
        validate(daemon, "someone/else", form | {"hub_endpoint": hub.address})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": "mamba"}, "model_type 'mamba'; this engine runs"), ({"text_config": 3}, "text_config")],
)
def test_a_model_that_the_engine_does_not_run_is_refused(
    daemon: Daemon, form: Form, changes: dict[str, Any], message: str
) -> None:
    bring(Path(form["storage"]) / "models" / "odd", **changes)
    with pytest.raises(PluginError, match=message):
        validate(daemon, "odd", form)
    assert schema_of(daemon, "odd", form) is None


def test_a_wrong_setting_in_its_form_is_refused_by_name(daemon: Daemon, form: Form) -> None:
    with pytest.raises(PluginError, match="max_waiting is 'many'"):
        validate(daemon, "demo", form | {"max_waiting": "many"})


def test_a_model_that_was_removed_is_known_no_more(daemon: Daemon, form: Form) -> None:
    folder = bring(Path(form["storage"]) / "models" / "mine")
    assert schema_of(daemon, "mine", form)
    shutil.rmtree(folder)
    assert schema_of(daemon, "mine", form) is None


def test_the_form_is_offered_for_models_of_ones_own() -> None:
    provider = yaml.safe_load((ROOT / "provider" / "tessera.yaml").read_text(encoding="utf-8"))
    assert "customizable-model" in provider["configurate_methods"]
    assert provider["model_credential_schema"]["model"]["label"].keys() == {"en_US", "zh_Hans"}
