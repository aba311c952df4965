"""The predefined models: data, Dify's files made from them, and what the engine runs, agree."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from cli.list_models import offered
from engine.catalog import BUNDLED, ROOT, catalog, find_checkpoint, folder_name, known_models, repository_of
from engine.errors import UnknownModel
from engine.families import FAMILIES, CheckpointConfig, family_for
from tools.model_files import FOLDER, POSITION, SAMPLE, model_files

SHAPES = {
    "qwen2.5-vl-7b": "qwen2.5-vl-7b",
    "qwen3-vl-2b": "qwen3-vl-2b",
    "smolvlm2-256m": "smolvlm-256m",
    "smolvlm2-2.2b": "smolvlm-2.2b",
}


def test_the_files_are_the_catalogue_s() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.yaml") if path.name != SAMPLE}
    assert there == model_files(), "run `python -m tools.model_files`"


def test_dify_shows_the_bundled_model_first_and_then_every_file() -> None:
    names = yaml.safe_load((FOLDER / POSITION).read_text(encoding="utf-8"))
    assert names[: len(BUNDLED)] == list(BUNDLED)
    assert sorted(names) == sorted(path.stem for path in FOLDER.glob("*.yaml") if path.name != POSITION)


def test_no_model_is_offered_that_the_engine_does_not_run() -> None:
    families = {family.name for family in FAMILIES}
    assert {model.name for model in offered()} == {
        model.name for model in catalog().values() if model.family in families
    }
    assert offered()


@pytest.mark.parametrize("family", sorted({model.family for model in offered()}))
def test_a_family_that_is_offered_as_one_that_sees_has_a_tower(family: str) -> None:
    config: dict[str, Any] = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
    # transformers' defaults of tower and decoder do not always fit each other
    config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    sizes = {"smolvlm": {"image_size": 512, "patch_size": 16}, "gemma3": {"image_size": 896, "patch_size": 14}}
    config["vision_config"] |= sizes.get(family, {})
    spec = family_for(config).spec(CheckpointConfig(model=config, generation={}, preprocessor={}))
    sees = {model.vision for model in offered() if model.family == family}
    assert sees == {spec.vision is not None}


@pytest.mark.parametrize("model", catalog().values(), ids=lambda model: model.name)
def test_an_entry_is_plausible(model: Any) -> None:
    repository = repository_of(model.name)
    assert repository is not None
    assert repository.name == model.repository
    assert folder_name(model.repository) == folder_name(model.name) == model.name
    assert 2 * model.parameters * 0.98 < model.download_mb < 4 * model.parameters * 1.05  # 16 or 32 bits each
    assert model.memory_mib("int8") < model.memory_mib("fp16") < 3 * model.memory_mib("int8")
    assert model.memory_mib("int8") > model.parameters * 1e6 / 2**20
    assert 8192 <= model.context <= 262144
    assert model.licence
    size = model.label.split()[-1]
    assert size in ("256M", "500M") or abs(float(size[:-1]) * 1000 - model.parameters) < 0.3 * model.parameters


@pytest.mark.parametrize(("name", "shape"), SHAPES.items())
def test_an_entry_s_size_is_the_published_shape_s(name: str, shape: str) -> None:
    config = json.loads((ROOT / "benchmarks" / "shapes" / shape / "config.json").read_text(encoding="utf-8"))
    family = family_for(config)
    spec = family.spec(CheckpointConfig(model=config, generation={}, preprocessor={}))
    parameters = sum(math.prod(source.shape) for weight in family.weights(spec) for source in weight.sources)
    assert parameters / 1e6 == pytest.approx(catalog()[name].parameters, rel=0.02)


def test_a_revision_of_a_predefined_model_s_repository_is_a_model_of_its_own() -> None:
    assert folder_name("Qwen/Qwen3-VL-2B-Instruct") == "qwen3-vl-2b"
    assert folder_name("Qwen/Qwen3-VL-2B-Instruct@v1") == "Qwen--Qwen3-VL-2B-Instruct@v1"
    repository = repository_of("google/gemma-3-4b-it")
    assert repository is not None
    assert repository.on(modelscope=False) == "google/gemma-3-4b-it"
    assert repository.on(modelscope=True) == "LLM-Research/gemma-3-4b-it"


@pytest.mark.parametrize("name", ["", "a", "../x", "a/../b", "a/b/c", "/a/b", "a/b@", "a/b@../c", "a b/c", "a/b\n"])
def test_what_no_hub_can_know_is_no_repository(name: str) -> None:
    assert repository_of(name) is None


def test_a_model_goes_by_its_folder_s_name_or_path(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (tmp_path / "models" / ".half.partial").mkdir()
    assert find_checkpoint("mine", tmp_path) == find_checkpoint(str(folder), tmp_path) == folder
    assert known_models(tmp_path).keys() == {"demo", "mine"}
    for name in (str(tmp_path / "elsewhere"), ".half.partial", "../models"):
        with pytest.raises(UnknownModel):
            find_checkpoint(name, tmp_path)


def test_the_catalogue_is_cheap_to_import() -> None:
    heavy = {"numpy", "torch", "transformers", "onnxruntime", "httpx", "yaml"}
    code = "import sys, engine.catalog, engine.hub.progress; engine.catalog.catalog(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not heavy & set(done.stdout.split())
