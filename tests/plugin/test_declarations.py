"""The manifest, the provider's form and the models' files agree with each other, the settings and the files on disk."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.catalog import BUNDLED, catalog
from engine.config import EngineConfig
from engine.errors import InvalidConfig, InvalidParameter
from engine.request import SamplingParams
from models.llm.parameters import RESPONSE_FORMATS
from tools.terminal_pictures import PICTURES

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = {"en_US", "zh_Hans"}


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


MANIFEST = load("manifest.yaml")
PROVIDER = load("provider/tessera.yaml")
FIELDS: list[dict[str, Any]] = PROVIDER["provider_credential_schema"]["credential_form_schemas"]
MODEL_FILES = sorted(path for path in (ROOT / "models").glob("*/*.yaml") if path.name != "_position.yaml")


def test_the_manifest_and_pyproject_name_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (MANIFEST["name"], MANIFEST["version"]) == (project["name"], project["version"])


def test_the_manifest_is_one_that_the_marketplace_takes() -> None:
    assert re.fullmatch(r"[a-z0-9_-]{1,64}", MANIFEST["author"])
    assert not re.search("dify|langgenius", MANIFEST["author"])
    assert MANIFEST["meta"]["arch"] == ["amd64"]
    assert MANIFEST["meta"]["runner"] == {"language": "python", "version": "3.12", "entrypoint": "main"}
    assert (ROOT / MANIFEST["privacy"]).is_file()
    assert MANIFEST["repo"].startswith("https://github.com/")


def test_every_icon_exists_lies_flat_and_has_a_dark_twin() -> None:
    names = [MANIFEST["icon"], MANIFEST["icon_dark"]]
    for size in ("icon_small", "icon_large", "icon_small_dark", "icon_large_dark"):
        names += PROVIDER[size].values()
    pictures = {f"{name}.svg" for name in PICTURES}  # of the README, which Dify and the marketplace show, too
    assert {path.name for path in (ROOT / "_assets").iterdir()} == {*names, *pictures}
    assert all((ROOT / "_assets" / name).stat().st_size < 8192 for name in names)


def test_the_sources_that_the_provider_names_exist() -> None:
    assert MANIFEST["plugins"]["models"] == ["provider/tessera.yaml"]
    python = PROVIDER["extra"]["python"]
    for source in (python["provider_source"], *python["model_sources"]):
        assert (ROOT / source).is_file(), source


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_a_model_file_is_named_after_its_model(path: Path) -> None:
    model = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert model["model"] == path.stem
    assert model["model_type"] == path.parent.name
    assert model["model_type"] in PROVIDER["supported_model_types"]


def test_the_position_file_lists_every_model_once() -> None:
    assert sorted(load("models/llm/_position.yaml")) == [path.stem for path in MODEL_FILES]


def test_every_predefined_model_comes_with_the_plugin_or_is_downloaded() -> None:
    assert {path.stem for path in MODEL_FILES} - catalog().keys() == set(BUNDLED)


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """Every mapping that holds a text per language."""
    if isinstance(node, dict):
        if "en_US" in node:
            yield path, node
        for key, value in node.items():
            yield from _texts(value, f"{path}/{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, f"{path}[{index}]")


@pytest.mark.parametrize("path", ["manifest.yaml", "provider/tessera.yaml", "models/llm/demo.yaml"])
def test_every_text_is_there_in_both_languages(path: str) -> None:
    texts = [(place, text) for place, text in _texts(load(path)) if not place.startswith("/icon_")]
    assert texts
    for place, text in texts:
        assert text.keys() == LANGUAGES, place
        assert all(text.values()), place


def test_every_field_of_the_form_is_a_setting_and_has_a_help() -> None:
    settings = {field.name for field in dataclasses.fields(EngineConfig)}
    names = [field["variable"] for field in FIELDS]
    assert set(names) <= settings
    assert len(names) == len(set(names)) <= 32  # Dify's own limit
    for field in FIELDS:
        assert field["help"]
        assert field["required"] is False


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field["variable"])
def test_the_form_shows_the_default_that_an_empty_field_means(field: dict[str, Any]) -> None:
    name = field["variable"]
    if name in ("storage", "hub_token"):  # its default depends on the machine; there is none
        return
    shown = field["default"] if "default" in field else field["placeholder"]["en_US"]
    assert getattr(EngineConfig.from_mapping({name: shown}), name) == getattr(EngineConfig(), name)


# What people may write that a field must refuse: something of another type, and values beside its range.
WRONG: dict[str, tuple[str, ...]] = {
    "storage": ("relative/folder", "tessera"),
    "device": ("gpu", "cuda:x", "cuda:0,0", "0"),
    "precision": ("int4", "16"),
    "hub_endpoint": ("huggingface.co", "ftp://huggingface.co", "https://user:secret@huggingface.co", "https://"),
    "hub_token": ("hf_a b", "hf_a\nX-Header: 1", "x" * 513),
    "download_wait_s": ("soon", "-1", "601"),
    "gpu_memory": ("most", "0", "0.99", "100", "-1"),
    "kv_precision": ("fp8", "8"),
    "kernel_fusion": ("true", "1"),
    "idle_unload_minutes": ("never", "-1"),
    "max_batch_size": ("many", "1.5", "0", "1025"),
    "max_waiting": ("many", "1.5", "-1", "100001"),
    "request_timeout_s": ("long", "0", "86401"),
    "kv_cache_mib": ("1 GB", "0.5", "0", "1048577"),
    "max_image_megapixels": ("large", "0", "10001", "nan", "inf"),
    "max_image_mib": ("20 MB", "0", "257", "1.5"),
    "allow_private_images": ("yes", "1"),
    "max_images": ("all", "0", "10001"),
    "max_video_tokens": ("all", "63", "1048577", "1.5"),
    "cache_enabled": ("no", "0"),
    "answer_cache_mib": ("1 GB", "0", "1048577"),
    "feature_cache_mib": ("1 GB", "0", "1048577"),
    "cache_expiry_hours": ("a week", "0", "87601"),
    "threads": ("all", "-1", "1025"),
    "metrics_port": ("all", "-1", "65536"),
}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field["variable"])
def test_every_field_refuses_another_type_and_what_is_out_of_range_by_its_name(field: dict[str, Any]) -> None:
    name = field["variable"]
    for value in WRONG[name]:
        with pytest.raises(InvalidConfig, match=name) as refused:
            EngineConfig.from_mapping({name: value})
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field["variable"])
@pytest.mark.parametrize("empty", ["", "  ", None])
def test_an_empty_field_means_its_default(field: dict[str, Any], empty: str | None) -> None:
    assert EngineConfig.from_mapping({field["variable"]: empty}) == EngineConfig()


def test_a_model_of_ones_own_has_the_same_form_as_the_provider() -> None:
    assert PROVIDER["configurate_methods"] == ["predefined-model", "customizable-model"]
    assert PROVIDER["model_credential_schema"]["credential_form_schemas"] == FIELDS


def test_only_the_token_is_a_secret() -> None:
    assert [field["variable"] for field in FIELDS if field["type"] == "secret-input"] == ["hub_token"]
    secret = EngineConfig.from_mapping({"hub_token": "hf_secret"})
    assert "hf_secret" not in repr(secret)


@pytest.mark.parametrize(
    "field", [field for field in FIELDS if "options" in field], ids=lambda field: field["variable"]
)
def test_every_choice_of_the_form_is_a_valid_setting(field: dict[str, Any]) -> None:
    for option in field["options"]:
        EngineConfig.from_mapping({field["variable"]: option["value"]})
    with pytest.raises(InvalidConfig):
        EngineConfig.from_mapping({field["variable"]: "something else"})


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_the_parameters_are_the_engines_with_its_defaults_and_within_its_ranges(path: Path) -> None:
    rules = {rule["name"]: rule for rule in yaml.safe_load(path.read_text(encoding="utf-8"))["parameter_rules"]}
    engine = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert rules.keys() - {"enable_thinking"} == engine.keys() - {"stop", "json_object"} | {"response_format"}
    assert tuple(rules["response_format"]["options"]) == RESPONSE_FORMATS
    for name, rule in rules.items():
        for bound in ("min", "max"):
            if bound in rule:
                SamplingParams(**{name: rule[bound]})
        if "default" in rule and not rule.get("required"):  # what Dify leaves out is the engine's default
            assert rule["default"] == engine[name], name


def test_a_parameter_beyond_a_declared_range_is_also_one_for_the_engine() -> None:
    with pytest.raises(InvalidParameter):
        SamplingParams(top_p=0.0)


def test_the_declared_context_is_the_checkpoints() -> None:
    config = json.loads((ROOT / "demo" / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    assert load("models/llm/demo.yaml")["model_properties"]["context_size"] == text["max_position_embeddings"]


@pytest.mark.parametrize("folder", ["models", "provider", "cli", "engine"])
def test_code_files_stay_small_enough_to_read_in_one_sitting(folder: str) -> None:
    long = [path for path in (ROOT / folder).rglob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 400]
    assert not long


@pytest.mark.parametrize("path", ["README.md", "readme/README_zh_Hans.md"])
def test_the_readme_lists_every_field_of_the_form_with_its_default(path: str) -> None:
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \|([^|]*)\|", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == [field["variable"] for field in FIELDS]
    for name, default in rows:
        if name not in ("storage", "hub_token"):
            setting = EngineConfig.from_mapping({name: default.strip(" `")})
            assert getattr(setting, name) == getattr(EngineConfig(), name), name


def test_the_readme_is_in_english() -> None:
    assert not re.search(r"[\u4e00-\u9fff]", (ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", ["README.md", "readme/README_zh_Hans.md", "PRIVACY.md"])
def test_what_the_texts_link_to_exists(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / path).parent.joinpath(target).exists(), target
    for sample in re.findall(r"samples/\w[\w.-]+", text):
        assert (ROOT / sample).is_file(), sample
