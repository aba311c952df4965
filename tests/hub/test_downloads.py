"""Downloads in the background: once however many ask, with progress in a sentence."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.catalog import find_checkpoint
from engine.config import EngineConfig
from engine.errors import DownloadFailed, EngineStopped, UnknownModel
from engine.hub.downloads import Downloads
from engine.hub.progress import ModelState, Progress, ProgressFile, label, model_state, read_progress
from tests.hub.conftest import NAME, SHARDS
from tests.hub.stand_in import HubStandIn


@pytest.fixture
def downloads(hub: HubStandIn, tmp_path: Path) -> Iterator[Downloads]:
    downloads = Downloads(EngineConfig(storage=tmp_path, hub_endpoint=hub.address))
    yield downloads
    downloads.close()


def test_many_who_ask_share_one_download(hub: HubStandIn, downloads: Downloads, tmp_path: Path) -> None:
    hub.faults.pause_s = 0.001
    with ThreadPoolExecutor(8) as people:
        folders = list(people.map(lambda _: downloads.start(NAME).result(30), range(8)))
    assert set(folders) == {find_checkpoint(NAME, tmp_path)}
    assert set(hub.asked().values()) == {1}
    assert downloads.names() == []


def test_while_it_runs_everybody_sees_how_far_it_is(hub: HubStandIn, downloads: Downloads, tmp_path: Path) -> None:
    assert model_state(NAME, tmp_path) == ModelState("absent")
    hub.faults.pause_s = 0.02
    future = downloads.start(NAME)
    while not hub.asked()[SHARDS[0]]:
        time.sleep(0.01)
    time.sleep(1.1)  # the file with the progress is written once a second
    state = model_state(NAME, tmp_path)
    assert state.state == "downloading"
    assert state.progress is not None
    assert 0 < state.progress.done < state.progress.total
    assert str(downloads.note(NAME)).startswith("downloading tiny: 0.")
    assert downloads.names() == ["someone--tiny"]
    hub.faults.pause_s = 0.0
    assert model_state(NAME, tmp_path) != state or future.result(30)
    future.result(30)
    assert model_state(NAME, tmp_path) == ModelState("here", folder=find_checkpoint(NAME, tmp_path))


def test_what_follows_a_model_starts_when_it_is_here_and_fails_with_its_download(
    hub: HubStandIn, downloads: Downloads
) -> None:
    def load() -> Future[str]:
        loaded: Future[str] = Future()
        loaded.set_result("loaded")
        return loaded

    def fail() -> Future[str]:
        raise RuntimeError("no more work")

    hub.gated.add(NAME)
    assert isinstance(downloads.after(NAME, load).exception(30), DownloadFailed)
    assert isinstance(downloads.after("nonsense", load).exception(0), UnknownModel)
    hub.gated.clear()
    assert isinstance(downloads.after(NAME, fail).exception(30), EngineStopped)
    assert downloads.after(NAME, load).result(30) == "loaded"


def test_a_failed_download_is_tried_again_by_the_next_who_asks(hub: HubStandIn, downloads: Downloads) -> None:
    hub.gated.add(NAME)
    with pytest.raises(DownloadFailed, match="gated"):
        downloads.start(NAME).result(30)
    hub.gated.clear()
    assert downloads.start(NAME).result(30).is_dir()


def test_why_the_last_try_failed_is_told_while_the_next_is_under_way(hub: HubStandIn, downloads: Downloads) -> None:
    hub.gated.add(NAME)
    downloads.start(NAME).exception(30)
    assert "the last try failed: someone/tiny is gated" in str(downloads.note(NAME))
    hub.gated.clear()
    downloads.start(NAME).result(30)
    assert "failed" not in str(downloads.note(NAME))


def test_closing_stops_what_runs_and_keeps_what_came(hub: HubStandIn, downloads: Downloads, tmp_path: Path) -> None:
    hub.faults.pause_s = 0.02
    future = downloads.start(NAME)
    while not hub.asked()[SHARDS[0]]:
        time.sleep(0.01)
    downloads.close()
    assert future.exception(1) is not None
    assert list((tmp_path / "models" / ".someone--tiny.partial").glob("*.part"))


def test_a_name_that_cannot_be_downloaded_is_refused_at_once(downloads: Downloads, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="known models: demo"):
        downloads.start("nonsense")
    assert model_state("nonsense", tmp_path) == ModelState("unknown")


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress(0, 0), "asking the hub"),
        (Progress(1_200_000_000, 4_500_000_000, 27_500_000), "1.2 of 4.5 GB, 2 min left"),
        (Progress(3_000_000, 65_000_000), "3.0 of 65.0 MB"),
        (Progress(60_000_000, 65_000_000, 1_000_000), "60.0 of 65.0 MB, less than a minute left"),
        (Progress(0, 19_000_000_000, 1_000_000), "0.0 of 19.0 GB, 5 h left"),
    ],
)
def test_progress_is_a_sentence(progress: Progress, text: str) -> None:
    assert str(progress) == text


def test_what_is_on_the_disk_already_says_nothing_about_the_speed(tmp_path: Path) -> None:
    clock = ProgressFile(tmp_path, 1000)
    clock.found(600)
    assert (clock.progress.done, clock.progress.rate) == (600, 0.0)
    assert read_progress(tmp_path) == Progress(600, 1000)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"done": "x"}', '{"done": 1, "total": null, "rate": 0}'])
def test_a_damaged_progress_file_is_no_progress(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert read_progress(tmp_path) == Progress(0, 0)


def test_people_read_the_catalogues_label() -> None:
    assert label("qwen3.5-2b") == label("Qwen/Qwen3.5-2B") == "Qwen3.5 2B"
    assert label("someone/tiny") == "tiny"
