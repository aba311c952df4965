"""pull, list, convert and remove, as people call them."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.__main__ import main
from engine.catalog import ROOT, catalog
from engine.families import FAMILIES
from tests.hub.conftest import demo_repository
from tests.hub.stand_in import HubStandIn
from tests.runtime import models

NAME = "someone/demo"


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn({NAME: demo_repository()}) as hub:
        yield hub


def listed(storage: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert main(["list", "--storage", str(storage), "--json"]) == 0
    models = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
    return {model["name"]: model for model in models}


def pull(name: str, hub: HubStandIn, storage: Path) -> int:
    return main(["pull", name, "--hub", hub.address, "--storage", str(storage)])


def test_a_model_is_pulled_listed_converted_and_removed(
    hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "someone--demo"
    assert pull(NAME, hub, tmp_path) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    assert pull(NAME, hub, tmp_path) == 0, "it is there"
    assert set(hub.asked().values()) == {1}
    capsys.readouterr()
    row = listed(tmp_path, capsys)["someone--demo"]
    assert (row["state"], row["artifacts"]) == ("here", {})
    assert row["from"].startswith("someone/demo@c0ffee")
    assert main(["convert", NAME, "--storage", str(tmp_path)]) == 0
    assert main(["convert", str(folder), "--precision", "fp32", "--storage", str(tmp_path)]) == 0
    capsys.readouterr()
    assert listed(tmp_path, capsys)["someone--demo"]["artifacts"].keys() == {"int8", "fp32"}
    assert main(["remove", NAME, "--storage", str(tmp_path), "--converted"]) == 0
    assert listed(tmp_path, capsys)["someone--demo"]["artifacts"] == {}
    assert main(["remove", NAME, "--storage", str(tmp_path)]) == 0
    assert "someone--demo" not in listed(tmp_path, capsys)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".someone--demo.lock"]


def test_the_token_comes_from_the_environment(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.token = "hf_secret"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert pull(NAME, hub, tmp_path) == 1
    assert "put a token that may read it" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert pull(NAME, hub, tmp_path) == 0
    assert "hf_secret" not in "".join(capsys.readouterr())


def test_every_predefined_model_that_the_engine_runs_can_be_pulled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    families = {family.name for family in FAMILIES}
    rows = listed(tmp_path, capsys)
    assert rows.keys() == {"demo"} | {model.name for model in catalog().values() if model.family in families}
    assert {row["state"] for name, row in rows.items() if name != "demo"} == {"absent"}


def test_a_folder_copied_by_hand_is_listed_and_one_without_weights_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "demo", tmp_path / "models" / "mine")
    shutil.copytree(ROOT / "demo", tmp_path / "models" / "half")
    (tmp_path / "models" / "half" / "model.safetensors").unlink()
    rows = listed(tmp_path, capsys)
    assert (rows["mine"]["state"], rows["mine"]["from"]) == ("here", "a copy in models/")
    assert rows["half"]["state"] == "unusable"
    assert "model.safetensors is missing" in rows["half"]["problem"]
    assert main(["remove", "half", "--storage", str(tmp_path)]) == 0


def test_what_is_not_there_the_package_s_own_and_a_running_download_are_not_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["remove", "nothing", "--storage", str(tmp_path)]) == 1
    assert "./tessera list shows" in capsys.readouterr().err
    assert main(["remove", "demo", "--storage", str(tmp_path)]) == 1
    assert "part of the package" in capsys.readouterr().err
    partial = tmp_path / "models" / ".someone--demo.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors.0.part").write_bytes(b"12345")
    with (tmp_path / "models" / ".someone--demo.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["remove", NAME, "--storage", str(tmp_path)]) == 1
        assert "is being downloaded" in capsys.readouterr().err
        assert partial.exists()
    assert main(["remove", NAME, "--storage", str(tmp_path)]) == 0
    assert not partial.exists()


def test_an_unknown_name_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "nonsense", "--storage", str(tmp_path)]) == 1
    assert "tessera pull: unknown model 'nonsense'" in capsys.readouterr().err
    assert main(["convert", "nonsense", "--storage", str(tmp_path)]) == 1
    assert "tessera convert: unknown model 'nonsense'" in capsys.readouterr().err


def test_a_precision_that_a_model_does_not_bear_is_not_converted_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = models.save(models.gemma3_text(), tmp_path / "models" / "gemma")
    capsys.readouterr()
    assert main(["convert", str(folder), "--precision", "fp16", "--storage", str(tmp_path)]) == 1
    assert "choose bf16 or int8" in capsys.readouterr().err
    assert not (tmp_path / "artifacts").exists() or not any((tmp_path / "artifacts").iterdir())
    assert main(["convert", str(folder), "--precision", "bf16", "--storage", str(tmp_path)]) == 0


def test_a_reader_that_has_seen_enough_is_no_crash() -> None:
    command = [sys.executable, "-m", "cli", "list"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        listing.stdout.close()
        assert listing.stderr is not None
        assert listing.stderr.read() == ""
