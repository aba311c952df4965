"""A request for a model that is not there fetches it, and is answered by it or told how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import DownloadFailed, ModelDownloading, UnknownModel
from engine.request import Message, Text
from tests.engine.asking import Answer, ask, request
from tests.hub.conftest import demo_repository
from tests.hub.stand_in import HubStandIn

NAME = "someone/demo"
QUESTION = (Message("user", (Text("hello"),)),)
Start = Callable[..., Engine]


@pytest.fixture
def start(hub: HubStandIn, tmp_path: Path) -> Iterator[Start]:
    hub.repositories[NAME] = demo_repository()
    engines = []

    def started(**settings: Any) -> Engine:
        mapping = {"storage": tmp_path, "hub_endpoint": hub.address, "cache_enabled": False, "device": "cpu"}
        engines.append(Engine(EngineConfig.from_mapping(mapping | settings)))
        return engines[-1]

    yield started
    for engine in engines:
        engine.close()


def hello(engine: Engine, model: str = NAME) -> Answer:
    return ask(engine, request("hello", model=model, max_tokens=4, ignore_eos=True))


def test_a_model_that_comes_in_time_answers_the_first_request(start: Start, tmp_path: Path) -> None:
    engine = start()
    answers = [hello(engine) for _ in range(3)]
    expected = hello(engine, "demo").wait().text
    assert [answer.wait().text for answer in answers] == [expected] * 3
    assert list(engine.status()["models"]) == ["someone--demo", "demo"] or engine.status()["models"].keys() == {
        "demo",
        "someone--demo",
    }


def test_all_names_of_a_model_mean_one(start: Start, hub: HubStandIn, tmp_path: Path) -> None:
    engine = start()
    hello(engine).wait()
    for name in (NAME, "someone--demo", str(tmp_path / "models" / "someone--demo")):
        assert hello(engine, name).wait().tokens == 4
    assert engine.status()["models"].keys() == {"someone--demo"}


def test_whom_it_takes_too_long_is_told_how_far_it_is_and_a_later_request_is_answered(
    start: Start, hub: HubStandIn
) -> None:
    hub.faults.pause_s = 0.05
    engine = start(download_wait_s=1.5)
    answer = hello(engine).wait()
    with pytest.raises(
        ModelDownloading, match=r"^downloading demo: \d\.\d of 6\.6 MB.*; try again (then|in a moment)$"
    ):
        assert answer.text
    with pytest.raises(ModelDownloading, match="downloading demo"):
        engine.count_tokens(NAME, QUESTION)
    assert engine.status()["downloads"].keys() == {"someone--demo"}
    assert engine.pull(NAME)["state"] == "downloading"
    assert hello(engine, "demo").wait().tokens == 4, "other models go on meanwhile"
    hub.faults.pause_s = 0.0
    while engine.status()["downloads"]:
        time.sleep(0.02)
    assert hello(engine).wait().tokens == 4
    assert engine.pull(NAME) == {"state": "here", "note": ""}
    assert hub.asked()["model.safetensors"] == 1


def test_a_refusal_of_the_hub_ends_the_request_and_the_next_one_asks_again(start: Start, hub: HubStandIn) -> None:
    engine = start()
    hub.gated.add(NAME)
    with pytest.raises(DownloadFailed, match="accept its licence"):
        assert hello(engine).wait().text
    with pytest.raises(DownloadFailed, match="accept its licence"):
        engine.count_tokens(NAME, QUESTION)
    hub.gated.clear()
    assert hello(engine).wait().tokens == 4


def test_a_name_that_cannot_be_downloaded_is_refused_at_once(start: Start) -> None:
    engine = start()
    with pytest.raises(UnknownModel, match="known models: demo"):
        hello(engine, "nonsense")
    with pytest.raises(UnknownModel, match="known models: demo"):
        engine.pull("nonsense")


def test_without_a_hub_a_folder_copied_by_hand_is_a_model(start: Start, hub: HubStandIn, tmp_path: Path) -> None:
    engine = start(hub_endpoint="off")
    with pytest.raises(UnknownModel, match="downloads are off"):
        hello(engine)
    for folder in ("by-hand", "someone--demo"):  # under a name of one's own, or the one that stands for the repository
        (tmp_path / "models" / folder).mkdir(parents=True)
        for name, data in demo_repository().items():
            (tmp_path / "models" / folder / name).write_bytes(data)
    assert hello(engine, "by-hand").wait().tokens == 4
    assert hello(engine).wait().tokens == 4
    assert not hub.requests


def test_closing_does_not_wait_for_a_download(start: Start, hub: HubStandIn) -> None:
    hub.faults.pause_s = 0.05
    engine = start()
    answer = hello(engine)
    while not hub.asked()["model.safetensors"]:
        time.sleep(0.01)
    engine.close()
    assert answer.wait(1).error is not None
