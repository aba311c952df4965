"""Databases that are damaged, locked or gone: the cache is empty for a while, and no caller sees an error."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine.cache import Answer, AnswerCache, FeatureCache, database, store
from engine.request import Usage

KEY = b"k" * 32
ANSWER = Answer("text", "stop", Usage(1, 1))


def open_cache(folder: Path) -> AnswerCache:
    return AnswerCache(folder, size_limit_bytes=1 << 24, expiry_s=3600)


def fill(cache: AnswerCache, count: int = 200) -> None:
    for number in range(count):
        cache.put(number.to_bytes(32, "little"), Answer("y" * 2000, "stop", Usage(1, 1)))
    assert cache.flush()


def works(cache: AnswerCache) -> bool:
    for _ in range(3):  # the first may be what the damage is noticed by
        cache.put(KEY, ANSWER)
        cache.flush()
        cache.get(KEY)
        cache.flush()
    return cache.get(KEY) == ANSWER


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 100])


def torn_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    noise = np.random.default_rng(0).bytes(len(content))
    for start in range(4096, len(content), 4096):
        content[start : start + 2048] = noise[start : start + 2048]
    path.write_bytes(content)


def other_tables(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE Cache (something TEXT)")
        connection.execute("CREATE TABLE Settings (key TEXT NOT NULL UNIQUE, value)")


def gone(path: Path) -> None:
    path.unlink()


DAMAGES: list[Callable[[Path], None]] = [garbage, empty, half, torn_pages, other_tables, gone]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("log_kept", [True, False], ids=["with the log", "without the log"])
def test_a_damaged_database_is_replaced_when_it_is_opened(
    tmp_path: Path, damage: Callable[[Path], None], log_kept: bool
) -> None:
    cache = open_cache(tmp_path)
    fill(cache)
    cache.close()
    folder = tmp_path / "answers-v1"
    if not log_kept:
        for path in folder.glob("cache.db-*"):
            path.unlink()
    damage(folder / "cache.db")
    cache = open_cache(tmp_path)
    assert works(cache)
    cache.close()
    assert [path.name for path in tmp_path.iterdir() if "damaged" in path.name] == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_database_damaged_under_open_caches_is_replaced_once_for_all(
    tmp_path: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "READ_PAUSE_S", 0.0)
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    fill(first)
    damage(tmp_path / "answers-v1" / "cache.db")
    for cache in (first, second, first, second):
        for number in range(0, 200, 10):
            cache.get(number.to_bytes(32, "little"))
        cache.flush()
    first.close()
    second.close()
    first, second = open_cache(tmp_path), open_cache(tmp_path)
    assert works(first)
    assert second.get(KEY) == ANSWER
    first.close()
    second.close()


def test_a_folder_removed_under_an_open_cache_is_made_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, size_limit_bytes=1 << 24)
    features = np.ones((500, 100), np.float32)
    cache.put(KEY, features)
    cache.flush()
    shutil.rmtree(tmp_path / "features-v1")
    assert cache.get(KEY) is None
    cache.put(KEY, features)
    cache.flush()
    assert cache.get(KEY) is not None
    cache.close()


def test_a_database_locked_for_writing_still_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "WRITE_TIMEOUT_S", 0.05)
    cache = open_cache(tmp_path)
    cache.put(KEY, ANSWER)
    cache.flush()
    with closing(sqlite3.connect(tmp_path / "answers-v1" / "cache.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        cache.put(b"late", ANSWER)
        cache.flush()
        assert cache.get(KEY) == ANSWER
        assert cache.get(b"late") is None
    cache.put(b"late", ANSWER)
    cache.flush()
    assert cache.get(b"late") == ANSWER
    cache.close()


def test_a_database_locked_altogether_is_an_empty_cache_that_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "OPEN_WAIT_S", 0.05)
    monkeypatch.setattr(store, "READ_PAUSE_S", 0.0)
    cache = open_cache(tmp_path)
    cache.put(KEY, ANSWER)
    cache.flush()
    cache.close()
    database_file = tmp_path / "answers-v1" / "cache.db"
    with closing(sqlite3.connect(database_file, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        cache = open_cache(tmp_path)
        cache.put(b"while locked", ANSWER)
        assert cache.get(KEY) is None
        assert not cache.flush(0.1)
    assert cache.flush(10)
    assert cache.get(KEY) == cache.get(b"while locked") == ANSWER
    cache.close()


def test_a_file_where_the_folder_should_be_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "answers-v1").write_text("not a folder")
    with caplog.at_level(logging.INFO, "engine.cache"):
        cache = open_cache(tmp_path)
        for number in range(20):
            cache.put(bytes([number]), ANSWER)
            cache.get(bytes([number]))
        cache.flush()
        assert cache.get(KEY) is None
        cache.close()
    assert len(caplog.records) == 1
    assert "going on without it" in caplog.text
    assert (tmp_path / "answers-v1").read_text() == "not a folder"


def test_a_cache_that_could_not_be_opened_is_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "RETRY_S", 0.05)
    obstacle = tmp_path / "answers-v1"
    obstacle.write_text("not a folder")
    cache = open_cache(tmp_path)
    obstacle.unlink()
    time.sleep(0.06)
    assert works(cache)
    cache.close()
