"""SIGKILL at any moment, again and again on one storage folder: nothing on it is lost, wrong, or left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cli.daemon import Daemon, PluginCrashed, PluginError, Rules, Session
from engine.checkpoints import Artifact, Checkpoint
from tests.end_to_end.asking import about, children_of, is_gone, picture, text_of
from tests.robustness.conftest import QUESTION, ROOT

SHAPES = ("circle", "rectangle")
LONG = {"max_tokens": 1500, "ignore_eos": True}
UNREAD = Rules(stream_buffer=1 << 20)  # streams that run while nobody reads them must not hold each other up
BOUND_S = 10.0  # generous: what is measured is printed, a busy machine is no failure
Pictures = Callable[[], tuple[str, bytes]]


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_plugin_killed_at_any_moment_loses_nothing(tmp_path: Path, kills: int) -> None:
    storage, temporary = tmp_path / "storage", tmp_path / "tmp"
    temporary.mkdir()
    chance = random.Random(kills)
    moments = [_at_start, _while_streams_run, _while_it_converts, _while_caches_are_written]
    gone_s: list[float] = []
    for number in range(kills):
        moment = moments[number % len(moments)]
        form = {"storage": str(storage), "precision": chance.choice(["int8", "fp32"])}
        if moment is _while_it_converts:
            shutil.rmtree(storage / "artifacts", ignore_errors=True)
        with contextlib.ExitStack() as stack:
            plugin = Daemon(ROOT, env={"TMPDIR": str(temporary)}, credentials=form, rules=UNREAD)
            stack.callback(plugin.kill)
            moment(plugin, storage, chance, number)
            engines = children_of(plugin.pid)
            plugin.kill()
            killed_at = time.monotonic()
        _wait(lambda: all(map(is_gone, engines)))  # noqa: B023 - called at once
        gone_s.append(time.monotonic() - killed_at)
        assert plugin.noise == []
        _assert_sound(storage)
    with Daemon(ROOT, env={"TMPDIR": str(temporary)}, credentials={"storage": str(storage)}) as plugin:
        for number in range(kills):
            _assert_right(plugin, number)
        _assert_sound(storage)
    assert list(temporary.iterdir()) == []
    assert [path.name for path in (storage / "artifacts").glob("*.partial")] == []
    print(f"{kills} kills: the engine's process gone after at most {max(gone_s):.3f} s")


def _at_start(plugin: Daemon, storage: Path, chance: random.Random, number: int) -> None:
    """Anywhere from the birth of the process to its first answers, requests waiting on stdin."""
    for other in range(4):
        plugin.invoke_llm(*_question(number + other))
    time.sleep(chance.uniform(0.0, 2.0))


def _while_it_converts(plugin: Daemon, storage: Path, chance: random.Random, number: int) -> None:
    plugin.invoke_llm(*_question(number))
    _wait(lambda: any(path.is_dir() for path in storage.glob("artifacts/*")))  # under whatever name it begins
    time.sleep(chance.uniform(0.0, 0.1))


def _while_streams_run(plugin: Daemon, storage: Path, chance: random.Random, number: int) -> None:
    """The next request after a kill works; then many streams, and the end in their midst."""
    plugin.wait_until_ready()
    _assert_right(plugin, number)
    streams = [plugin.invoke_llm(about(picture(color=f"#{other:02x}c0c0"), QUESTION), LONG) for other in range(16)]
    next(iter(streams[0]))
    time.sleep(chance.uniform(0.0, 0.5))


def _while_caches_are_written(plugin: Daemon, storage: Path, chance: random.Random, number: int) -> None:
    """Answers and features of many new images are on their way to the disk."""
    plugin.wait_until_ready()
    _assert_right(plugin, number)
    many = [_question(chance.randrange(256)) for _ in range(24)]
    streams = [plugin.invoke_llm(*question) for question in many]
    last = chance.choice(streams)
    with contextlib.suppress(StopIteration):
        next(iter(last))
    time.sleep(chance.uniform(0.0, 0.05))


def _question(number: int) -> tuple[list[dict[str, object]]]:
    return (about(picture(SHAPES[number % 2], color=f"#{number:02x}3030"), QUESTION),)


def _assert_right(plugin: Daemon, number: int) -> None:
    assert text_of(plugin.invoke_llm(*_question(number))).strip() == SHAPES[number % 2]


def _assert_sound(storage: Path) -> None:
    """What a process that starts now finds: whole artifacts or none, databases in order, nothing else."""
    spec = Checkpoint.open(ROOT / "demo").spec
    artifacts = [path for path in storage.glob("artifacts/*") if path.is_dir() and path.suffix != ".partial"]
    for folder in artifacts:
        manifest = json.loads((folder / "artifact.json").read_bytes())
        Artifact.load(folder, manifest["digest"], spec, manifest["precision"])
    for database in storage.glob("cache/*/cache.db"):
        assert _integrity(database) == "ok"
    assert {path.name for path in storage.glob("*")} <= {"artifacts", "cache"}
    kinds = sorted({path.suffix for path in storage.glob("artifacts/*") if path not in artifacts})
    assert set(kinds) <= {".lock", ".partial"}
    assert len(list(storage.glob("artifacts/*"))) <= 2 * 3  # two precisions: the artifact, its lock, one leftover
    assert {path.name for path in storage.glob("cache/*")} <= {"answers-v1", "features-v1"}


def _integrity(database: Path) -> str:
    """SQLite's own check, on a copy with its log: opening the original would repair what the next process must."""
    with tempfile.TemporaryDirectory() as copies:
        for path in database.parent.glob(f"{database.name}*"):
            if not path.name.endswith("-shm"):
                shutil.copy(path, copies)
        with contextlib.closing(sqlite3.connect(Path(copies) / database.name)) as connection:
            return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_two_plugins_on_one_folder_one_killed_while_it_converts(tmp_path: Path) -> None:
    form = {"storage": str(tmp_path)}
    with Daemon(ROOT, credentials=form) as first, Daemon(ROOT, credentials=form) as second:
        first.invoke_llm(*_question(0))
        _wait(lambda: any((tmp_path / "artifacts").glob("*.partial")))
        session = second.invoke_llm(*_question(0))
        first.kill()
        assert text_of(session).strip() == SHAPES[0]
        _assert_sound(tmp_path)
        assert list((tmp_path / "artifacts").glob("*.partial")) == []


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A plugin whose engine may be killed."""
    form = {"storage": str(tmp_path_factory.mktemp("mortal"))}
    with Daemon(ROOT, env={"HEARTBEAT_INTERVAL": "0.5"}, credentials=form, rules=UNREAD) as running:
        yield running


def test_requests_of_an_engine_killed_while_it_loads_end_with_the_clear_error(mortal: Daemon) -> None:
    sessions = [mortal.invoke_llm(about(picture(color=f"#{number:02x}2020"), QUESTION)) for number in range(32)]
    _wait(lambda: bool(children_of(mortal.pid)))
    time.sleep(0.2)
    _assert_all_end(mortal, sessions)
    _assert_right(mortal, 0)


def test_32_streams_of_a_killed_engine_end_with_the_clear_error(mortal: Daemon) -> None:
    sessions = [mortal.invoke_llm(about(picture(color=f"#20{number:02x}20"), QUESTION), LONG) for number in range(32)]
    _wait(lambda: all(session.arrivals for session in sessions))
    _assert_all_end(mortal, sessions)
    _assert_right(mortal, 1)


def _assert_all_end(plugin: Daemon, sessions: list[Session]) -> None:
    """Kill the engine; each session ends with the sentence that says so."""

    def end(session: Session) -> tuple[float, str]:
        with pytest.raises(PluginError) as raised:
            text_of(session)
        assert raised.value.kind == "InvokeServerUnavailableError"
        return time.monotonic(), str(raised.value)

    (engine,) = children_of(plugin.pid)
    with ThreadPoolExecutor(len(sessions)) as readers:
        killed_at = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        ends = list(readers.map(end, sessions))
    worst = max(at for at, _ in ends) - killed_at
    print(f"{len(sessions)} requests told of the engine's death within {worst:.3f} s")
    assert worst < BOUND_S
    for _, sentence in ends:
        assert sentence.startswith("the engine's process ")
        assert "signal 9, SIGKILL" in sentence
    assert {sentence for _, sentence in ends} == {ends[0][1]}


def test_the_engine_of_a_killed_plugin_is_gone_while_it_loads_and_while_it_streams(tmp_path: Path) -> None:
    for streaming in (False, True):
        with Daemon(ROOT, credentials={"storage": str(tmp_path)}, rules=UNREAD) as plugin:
            sessions = [plugin.invoke_llm(about(picture(), str(number)), LONG) for number in range(8)]
            _wait(lambda: all(one.arrivals for one in sessions) if streaming else bool(children_of(plugin.pid)))  # noqa: B023
            (engine,) = children_of(plugin.pid)
            os.kill(plugin.pid, signal.SIGKILL)
            killed_at = time.monotonic()
            _wait(lambda: is_gone(engine))  # noqa: B023 - called at once
            print(f"plugin killed: its engine gone after {time.monotonic() - killed_at:.3f} s")
            with pytest.raises(PluginCrashed):
                text_of(sessions[0])
