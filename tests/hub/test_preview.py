"""What a repository's model can do is known from its small files, before anything large is fetched."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from pathlib import Path

import pytest

from engine.catalog import Repository
from engine.config import EngineConfig
from engine.describe import Description
from engine.errors import CheckpointError, DownloadFailed
from engine.hub.download import download
from engine.hub.preview import preview
from engine.hub.progress import lock_file, model_state, partial_folder
from tests.hub.conftest import NAME
from tests.hub.stand_in import HubStandIn

FOLDER = NAME.replace("/", "--")
DEMO = Description(context=4096, vision=True)


def config_for(hub: HubStandIn, storage: Path, **settings: str) -> EngineConfig:
    return EngineConfig.from_mapping({"storage": str(storage), "hub_endpoint": hub.address} | settings)


@pytest.mark.parametrize("endpoint", ["address", "modelscope"])
def test_no_weights_are_fetched(hub: HubStandIn, tmp_path: Path, endpoint: str) -> None:
    config = config_for(hub, tmp_path, hub_endpoint=getattr(hub, endpoint))
    assert preview(Repository(NAME), FOLDER, config) == DEMO
    assert set(hub.asked()) == {"config.json", "tokenizer_config.json"}


def test_the_hub_is_asked_once(hub: HubStandIn, tmp_path: Path) -> None:
    config = config_for(hub, tmp_path)
    assert [preview(Repository(NAME), FOLDER, config) for _ in range(3)] == [DEMO] * 3
    assert hub.asked()["config.json"] == 1


def test_the_download_goes_on_from_there(hub: HubStandIn, tmp_path: Path) -> None:
    config = config_for(hub, tmp_path)
    preview(Repository(NAME), FOLDER, config)
    assert model_state(NAME, tmp_path).state == "absent"
    assert (download(NAME, config, threading.Event()) / "config.json").is_file()
    assert hub.asked()["config.json"] == 1


def test_a_file_that_came_wrong_is_put_right_by_the_download(hub: HubStandIn, tmp_path: Path) -> None:
    config = config_for(hub, tmp_path)
    hub.faults.content["tokenizer_config.json"] = b"{}"
    preview(Repository(NAME), FOLDER, config)
    hub.faults.content.clear()
    folder = download(NAME, config, threading.Event())
    assert (folder / "tokenizer_config.json").read_bytes() == hub.repositories[NAME]["tokenizer_config.json"]


def test_a_model_that_is_not_run_is_refused_and_leaves_nothing(hub: HubStandIn, tmp_path: Path) -> None:
    hub.repositories[NAME]["config.json"] = json.dumps({"model_type": "mamba"}).encode()
    with pytest.raises(CheckpointError, match=f"^{NAME}: .*model_type 'mamba'; this engine runs"):
        preview(Repository(NAME), FOLDER, config_for(hub, tmp_path))
    assert not partial_folder(FOLDER, tmp_path).exists()


def test_a_repository_without_a_configuration_is_refused(hub: HubStandIn, tmp_path: Path) -> None:
    del hub.repositories[NAME]["config.json"]
    with pytest.raises(DownloadFailed, match=r"has no config\.json"):
        preview(Repository(NAME), FOLDER, config_for(hub, tmp_path))


def test_a_repository_that_is_not_there_is_refused_with_what_the_hub_says(hub: HubStandIn, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match="check the spelling"):
        preview(Repository("someone/else"), "someone--else", config_for(hub, tmp_path))


def test_a_hub_out_of_reach_is_named(tmp_path: Path) -> None:
    config = EngineConfig(storage=tmp_path, hub_endpoint="http://127.0.0.1:1")
    with pytest.raises(DownloadFailed, match=r"^http://127\.0\.0\.1:1 did not answer"):
        preview(Repository(NAME), FOLDER, config)


def test_a_hub_that_hangs_is_given_up_in_time(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.pause_s = 5.0
    started = time.monotonic()
    with pytest.raises(DownloadFailed, match=r"did not answer within 0\.3 seconds"):
        preview(Repository(NAME), FOLDER, config_for(hub, tmp_path), limit_s=0.3)
    assert time.monotonic() - started < 5


def test_while_a_download_is_under_way_its_files_are_waited_for(hub: HubStandIn, tmp_path: Path) -> None:
    config, partial = config_for(hub, tmp_path), partial_folder(FOLDER, tmp_path)
    partial.mkdir(parents=True)

    def arrive() -> None:
        (partial / "config.json").write_bytes(hub.repositories[NAME]["config.json"])

    with lock_file(FOLDER, tmp_path).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.2, arrive).start()
        assert preview(Repository(NAME), FOLDER, config) == DEMO
    assert not hub.requests
