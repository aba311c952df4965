"""A download ends with a whole, checked folder or with a sentence; nothing half-written is ever found as a model."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from engine.catalog import find_checkpoint, known_models
from engine.config import EngineConfig
from engine.errors import Cancelled, CheckpointError, DownloadFailed, StorageError, UnknownModel
from engine.hub import download as module
from engine.hub import listing, transfer
from engine.hub.download import download
from tests.hub.conftest import NAME, SHARDS, UNWANTED
from tests.hub.stand_in import COMMIT, HubStandIn

Fetch = Callable[..., Path]


@pytest.fixture
def fetch(hub: HubStandIn, tmp_path: Path) -> Fetch:
    def run(name: str = NAME, **settings: str) -> Path:
        config = EngineConfig.from_mapping({"storage": tmp_path, "hub_endpoint": hub.address} | settings)
        return download(name, config, threading.Event())

    return run


def assert_nothing_is_there(storage: Path) -> None:
    assert set(known_models(storage)) == {"demo"}
    with pytest.raises(UnknownModel):
        find_checkpoint(NAME, storage)


def assert_is_whole(folder: Path, hub: HubStandIn) -> None:
    wanted = {path: data for path, data in hub.repositories[NAME].items() if path not in UNWANTED}
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != module.RECORD} == wanted
    assert json.loads((folder / module.RECORD).read_text())["revision"] == COMMIT


@pytest.mark.parametrize("hub_name", ["address", "modelscope"])
def test_a_folder_holds_what_is_needed_and_nothing_else(
    hub: HubStandIn, fetch: Fetch, tmp_path: Path, hub_name: str
) -> None:
    folder = fetch(hub_endpoint=getattr(hub, hub_name))
    assert folder == find_checkpoint(NAME, tmp_path) == tmp_path / "models" / "someone--tiny"
    assert_is_whole(folder, hub)
    assert not set(hub.asked()) & set(UNWANTED)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == ["someone--tiny"]


def test_a_line_that_breaks_is_taken_up_where_it_broke(hub: HubStandIn, fetch: Fetch) -> None:
    hub.faults.breaks[SHARDS[0]] = [40_000, 30_000]
    assert_is_whole(fetch(), hub)
    ranges = [headers.get("Range") for path, headers in hub.requests if path.endswith(SHARDS[0])]
    assert ranges == [None, "bytes=40000-", "bytes=70000-"]


def test_a_line_that_falls_silent_is_taken_up_too(
    hub: HubStandIn, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "TIMEOUT", httpx.Timeout(0.5))
    hub.faults.breaks[SHARDS[0]], hub.faults.stall_s = [40_000], 2.0
    assert_is_whole(fetch(), hub)
    assert hub.asked()[SHARDS[0]] == 2


def test_a_later_download_goes_on_with_what_an_earlier_one_left(hub: HubStandIn, fetch: Fetch, tmp_path: Path) -> None:
    hub.faults.breaks[SHARDS[1]] = [90_000] + [0] * (transfer.RETRIES + 1)
    with pytest.raises(DownloadFailed, match=r"cannot be fetched .* What came so far is kept"):
        fetch()
    assert_nothing_is_there(tmp_path)
    hub.requests.clear()
    assert_is_whole(fetch(), hub)
    assert hub.asked() == {SHARDS[1]: 1}, "everything else was there, and was checked instead of fetched"
    assert hub.requests[-1][1]["Range"] == "bytes=90000-"


@pytest.mark.parametrize("fault", ["no_ranges", "wrong_ranges"])
def test_a_hub_that_cannot_continue_is_asked_for_the_whole_file(hub: HubStandIn, fetch: Fetch, fault: str) -> None:
    hub.faults.breaks[SHARDS[0]] = [40_000]
    setattr(hub.faults, fault, True)
    assert_is_whole(fetch(), hub)


def test_a_part_of_another_version_of_a_file_is_not_continued(hub: HubStandIn, fetch: Fetch, tmp_path: Path) -> None:
    hub.faults.breaks[SHARDS[0]] = [90_000] + [0] * (transfer.RETRIES + 1)
    with pytest.raises(DownloadFailed):
        fetch()
    hub.repositories[NAME][SHARDS[0]] = hub.repositories[NAME][SHARDS[0]][:-4] + b"\1\2\3\4"
    hub.requests.clear()
    assert_is_whole(fetch(), hub)
    assert "Range" not in hub.requests[-2][1]


def test_a_damaged_part_is_fetched_anew(hub: HubStandIn, fetch: Fetch, tmp_path: Path) -> None:
    hub.faults.breaks[SHARDS[0]] = [90_000] + [0] * (transfer.RETRIES + 1)
    with pytest.raises(DownloadFailed):
        fetch()
    (part,) = (tmp_path / "models" / ".someone--tiny.partial").glob("*.part")
    part.write_bytes(b"\0" * 300_000)  # and longer than the file
    assert_is_whole(fetch(), hub)


def test_a_finished_file_that_was_damaged_meanwhile_is_fetched_anew(
    hub: HubStandIn, fetch: Fetch, tmp_path: Path
) -> None:
    hub.faults.breaks[SHARDS[1]] = [0] * (transfer.RETRIES + 1)
    with pytest.raises(DownloadFailed):
        fetch()
    shard = tmp_path / "models" / ".someone--tiny.partial" / SHARDS[0]
    shard.write_bytes(b"x" * shard.stat().st_size)
    assert_is_whole(fetch(), hub)


@pytest.mark.parametrize("path", [SHARDS[0], "config.json"], ids=["in LFS", "in git"])
@pytest.mark.parametrize("hub_name", ["address", "modelscope"])
@pytest.mark.parametrize("change", [lambda data: data[:-1] + b"!", lambda data: data + b"!"], ids=["other", "longer"])
def test_a_file_with_another_hash_is_refused(
    hub: HubStandIn,
    fetch: Fetch,
    tmp_path: Path,
    path: str,
    hub_name: str,
    change: Callable[[bytes], bytes],
) -> None:
    hub.faults.content[path] = change(hub.repositories[NAME][path])
    with pytest.raises(DownloadFailed, match=f"{path} of {NAME} came twice with another hash"):
        fetch(hub_endpoint=getattr(hub, hub_name))
    assert_nothing_is_there(tmp_path)
    hub.faults.content.clear()
    assert_is_whole(fetch(), hub)


def test_a_file_that_stays_shorter_than_announced_ends_the_download(
    hub: HubStandIn, fetch: Fetch, tmp_path: Path
) -> None:
    hub.faults.content[SHARDS[0]] = hub.repositories[NAME][SHARDS[0]][:-100]
    with pytest.raises(DownloadFailed, match="cannot be fetched"):
        fetch()
    assert_nothing_is_there(tmp_path)


def test_a_hub_that_is_busy_is_asked_again(hub: HubStandIn, fetch: Fetch) -> None:
    hub.faults.statuses[SHARDS[0]] = [503, 429, 500]
    assert_is_whole(fetch(), hub)


def test_a_hub_out_of_reach_is_named(fetch: Fetch, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match=r"http://127\.0\.0\.1:9 cannot be reached .* check hub_endpoint"):
        fetch(hub_endpoint="http://127.0.0.1:9")
    assert_nothing_is_there(tmp_path)


@pytest.mark.parametrize("hub_name", ["address", "modelscope"])
def test_a_model_that_the_hub_does_not_have_is_said_to_be_missing(hub: HubStandIn, fetch: Fetch, hub_name: str) -> None:
    with pytest.raises(DownloadFailed, match=r"someone/else.*check the spelling"):
        fetch("someone/else", hub_endpoint=getattr(hub, hub_name))


@pytest.mark.parametrize("hub_name", ["address", "modelscope"])
def test_a_revision_that_is_not_there_is_said_to_be_missing(hub: HubStandIn, fetch: Fetch, hub_name: str) -> None:
    with pytest.raises(DownloadFailed, match=f"127.0.0.1 has no .*{NAME}"):
        fetch(f"{NAME}@v9", hub_endpoint=getattr(hub, hub_name))


def test_modelscope_s_refusal_is_passed_on(hub: HubStandIn, fetch: Fetch) -> None:
    hub.faults.refusal = "record not found"
    with pytest.raises(DownloadFailed, match=f"refuses {NAME}: record not found"):
        fetch(hub_endpoint=hub.modelscope)


def test_a_folder_that_was_copied_meanwhile_is_the_model(hub: HubStandIn, fetch: Fetch, tmp_path: Path) -> None:
    brought = tmp_path / "models" / "someone--tiny"

    def copy(*_: object) -> None:
        brought.mkdir()
        (brought / "config.json").write_text("{}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_record", copy)
        assert fetch() == brought
    assert [path.name for path in brought.iterdir()] == ["config.json"]
    assert not (tmp_path / "models" / ".someone--tiny.partial").exists()


def test_a_revision_has_a_folder_of_its_own(hub: HubStandIn, fetch: Fetch, tmp_path: Path) -> None:
    assert fetch(f"{NAME}@{COMMIT}").name == f"someone--tiny@{COMMIT}"
    assert_nothing_is_there_but(tmp_path, f"someone--tiny@{COMMIT}")


def assert_nothing_is_there_but(storage: Path, folder: str) -> None:
    assert set(known_models(storage)) == {"demo", folder}


def test_a_gated_model_asks_for_its_licence_and_a_token(hub: HubStandIn, fetch: Fetch) -> None:
    hub.gated.add(NAME)
    with pytest.raises(DownloadFailed, match=r"is gated at 127\.0\.0\.1: accept its licence .* \(hub_token\)"):
        fetch()


@pytest.mark.parametrize("hub_name", ["address", "modelscope"])
def test_a_token_opens_a_private_model_and_appears_nowhere(
    hub: HubStandIn, fetch: Fetch, tmp_path: Path, hub_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub.token = "hf_secret"
    endpoint = getattr(hub, hub_name)
    for token in ("", "hf_wrong"):
        with pytest.raises(DownloadFailed, match="put a token that may read it into the form") as refused:
            fetch(hub_endpoint=endpoint, hub_token=token)
        assert "hf_wrong" not in str(refused.value)
    folder = fetch(hub_endpoint=endpoint, hub_token="hf_secret")
    assert_is_whole(folder, hub)
    assert "hf_secret" not in caplog.text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes()


def test_another_host_that_the_hub_sends_us_to_gets_no_token(hub: HubStandIn, fetch: Fetch) -> None:
    hub.token = "hf_secret"
    with HubStandIn(hub.repositories) as store:
        hub.faults.redirect = store.address.replace("127.0.0.1", "localhost")
        assert_is_whole(fetch(hub_token="hf_secret"), hub)
        assert store.asked() == {SHARDS[0]: 1, SHARDS[1]: 1, "tokenizer.json": 1}
        assert not [headers for _, headers in store.requests if "Authorization" in headers or "Cookie" in headers]


def test_a_redirect_without_end_is_not_followed(hub: HubStandIn, fetch: Fetch) -> None:
    hub.faults.redirect = hub.address
    with pytest.raises(DownloadFailed, match="TooManyRedirects"):
        fetch()


def test_what_is_no_hub_is_said_to_be_none(hub: HubStandIn, fetch: Fetch) -> None:
    hub.faults.page = True
    with pytest.raises(DownloadFailed, match="does not answer as a hub does"):
        fetch()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model.safetensors.index.json": b"{}"}, "has no weight_map"),
        ({"model.safetensors.index.json": b'{"weight_map": {"w": "../escape.safetensors"}}'}, "lacks ../escape"),
        ({"model.safetensors.index.json": b'{"weight_map": {"w": "pytorch_model.bin"}}'}, "lacks pytorch_model.bin"),
        ({"model.safetensors.index.json": b'{"weight_map": {"w": 3}}'}, "lacks 3"),
        ({"model.safetensors.index.json": b'{"weight_map": 3}'}, "has no weight_map"),
        ({"model.safetensors.index.json": b"<html>"}, "has no weight_map"),
        ({"model.safetensors.index.json": None}, "only safetensors files are read"),
        ({"config.json": None}, "no config.json"),
    ],
)
def test_a_repository_without_usable_weights_is_refused(
    hub: HubStandIn, fetch: Fetch, tmp_path: Path, changes: dict[str, bytes | None], problem: str
) -> None:
    files = hub.repositories[NAME] | changes
    hub.repositories[NAME] = {path: data for path, data in files.items() if data is not None}
    with pytest.raises(DownloadFailed, match=problem):
        fetch()
    assert_nothing_is_there(tmp_path)


def test_a_model_that_the_engine_does_not_run_is_refused_before_its_weights(
    hub: HubStandIn, fetch: Fetch, tmp_path: Path
) -> None:
    hub.repositories[NAME]["config.json"] = b'{"model_type": "mamba9"}'
    with pytest.raises(CheckpointError, match=f"{NAME}: config.json has model_type 'mamba9'; this engine runs"):
        fetch()
    assert not set(hub.asked()) & set(SHARDS)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".someone--tiny.lock"]


def test_a_disk_with_too_little_room_is_named_before_the_weights(
    hub: HubStandIn, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(StorageError, match=r"someone/tiny needs .* more, but .* has 0\.0 GB free; free some"):
        fetch()
    assert not set(hub.asked()) & set(SHARDS)
    monkeypatch.undo()
    assert_is_whole(fetch(), hub)


def test_a_disk_that_fills_meanwhile_is_named_and_room_is_enough(hub: HubStandIn, fetch: Fetch, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="no space left"):
            fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_nothing_is_there(tmp_path)
    assert_is_whole(fetch(), hub)


def test_a_read_only_storage_folder_is_named(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(StorageError, match="cannot be written"):
        fetch()


def test_a_stopped_download_goes_on_the_next_time(hub: HubStandIn, fetch: Fetch, tmp_path: Path) -> None:
    hub.faults.pause_s = 0.01
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Cancelled):
        download(NAME, EngineConfig(storage=tmp_path, hub_endpoint=hub.address), stop)
    assert_nothing_is_there(tmp_path)
    hub.faults.pause_s = 0.0
    assert_is_whole(fetch(), hub)


@pytest.mark.parametrize("name", ["nonsense", "../etc", "a/b/c", "a/..", "/etc", "", ".", "x/y@../z", "-x/y"])
def test_a_name_that_no_hub_can_know_asks_nobody(hub: HubStandIn, fetch: Fetch, name: str) -> None:
    with pytest.raises(UnknownModel):
        fetch(name)
    assert not hub.requests


def test_downloads_can_be_off(hub: HubStandIn, fetch: Fetch) -> None:
    with pytest.raises(UnknownModel, match=r"downloads are off \(hub_endpoint in the form\); copy .* as someone--tiny"):
        fetch(hub_endpoint="off")
    assert not hub.requests
