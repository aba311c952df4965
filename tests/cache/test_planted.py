"""Rows and files that somebody else put into the folder: diskcache alone would unpickle, read or delete them."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import diskcache  # type: ignore[import-untyped]
import pytest

from engine.cache import Answer, AnswerCache
from engine.cache.disk import ForeignValue, RawDisk
from engine.request import Usage

KEY, OTHER = b"k" * 32, b"o" * 32
ANSWER = Answer("text", "stop", Usage(1, 1))
FILE_NAME = "ab/cd/" + "0" * 28 + ".val"
RAW, BINARY, TEXT, PICKLE = 1, 2, 3, 4

Plant = Callable[[Path, Path], None]


def open_cache(folder: Path) -> AnswerCache:
    return AnswerCache(folder, size_limit_bytes=1 << 24, expiry_s=3600)


def harmful(marker: Path) -> bytes:
    """A pickle, in its text form, that makes a file when it is loaded."""
    return f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()


def add_row(folder: Path, *, key: bytes = KEY, raw: int = 1, mode: int = RAW, filename: str | None = None,
            value: object = None) -> None:  # fmt: skip
    with closing(sqlite3.connect(folder / "cache.db")) as database, database:
        database.execute(
            "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, filename, value)"
            " VALUES (?, ?, 1, 1, 0, ?, ?, ?)",
            (key, raw, mode, filename, value),
        )


def add_file(folder: Path, content: bytes) -> Path:
    path = folder / FILE_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def rows(folder: Path) -> list[bytes]:
    with closing(sqlite3.connect(folder / "cache.db")) as database:
        return [key for (key,) in database.execute("SELECT key FROM Cache ORDER BY key")]


def pickled_value(folder: Path, marker: Path) -> None:
    add_row(folder, mode=PICKLE, value=harmful(marker))


def pickled_file(folder: Path, marker: Path) -> None:
    add_file(folder, harmful(marker))
    add_row(folder, mode=PICKLE, filename=FILE_NAME)


def pickle_as_bytes(folder: Path, marker: Path) -> None:
    add_row(folder, value=harmful(marker))


def pickle_as_binary_file(folder: Path, marker: Path) -> None:
    add_file(folder, harmful(marker))
    add_row(folder, mode=BINARY, filename=FILE_NAME)


def text_file(folder: Path, marker: Path) -> None:
    add_file(folder, b"text")
    add_row(folder, mode=TEXT, filename=FILE_NAME)


def number(folder: Path, marker: Path) -> None:
    add_row(folder, value=5)


def null(folder: Path, marker: Path) -> None:
    add_row(folder, value=None)


def unknown_mode(folder: Path, marker: Path) -> None:
    add_row(folder, mode=99, value=b"x")


def pipe(folder: Path, marker: Path) -> None:
    add_file(folder, b"").unlink()
    os.mkfifo(folder / FILE_NAME)
    add_row(folder, mode=BINARY, filename=FILE_NAME)


PLANTS: list[Plant] = [pickled_value, pickled_file, pickle_as_bytes, pickle_as_binary_file, text_file, number, null,
                       unknown_mode, pipe]  # fmt: skip


@pytest.mark.parametrize("plant", [pickled_value, pickled_file])
def test_the_library_alone_would_run_what_was_planted(tmp_path: Path, plant: Plant) -> None:
    diskcache.Cache(str(tmp_path)).close()
    plant(tmp_path, tmp_path / "ran")
    diskcache.Cache(str(tmp_path)).get(KEY)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("while_open", [True, False], ids=["while open", "before opening"])
@pytest.mark.parametrize("plant", PLANTS)
def test_what_was_planted_is_a_miss_and_is_removed(tmp_path: Path, plant: Plant, while_open: bool) -> None:
    folder, marker = tmp_path / "answers-v1", tmp_path / "ran"
    cache = open_cache(tmp_path)
    cache.put(OTHER, ANSWER)
    cache.flush()
    if not while_open:
        cache.close()
    plant(folder, marker)
    if not while_open:
        cache = open_cache(tmp_path)
    assert cache.get(KEY) is None
    cache.flush()
    assert not marker.exists()
    assert rows(folder) == [OTHER]
    assert cache.get(OTHER) == ANSWER
    cache.put(KEY, ANSWER)
    cache.flush()
    assert cache.get(KEY) == ANSWER
    cache.close()
    assert while_open is False or not (folder / FILE_NAME).exists()


@pytest.mark.parametrize("mode", [BINARY, PICKLE])
@pytest.mark.parametrize("inside", [True, False], ids=["relative", "absolute"])
def test_a_row_cannot_name_a_file_elsewhere(tmp_path: Path, mode: int, inside: bool) -> None:
    victim = tmp_path / "victim.val"
    victim.write_text("precious")
    cache = open_cache(tmp_path)
    folder = tmp_path / "answers-v1"
    add_row(folder, mode=mode, filename="../victim.val" if inside else str(victim))
    assert cache.get(KEY) is None
    cache.flush()
    assert rows(folder) == []
    assert victim.read_text() == "precious"
    cache.close()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.put(KEY, Answer("x" * 100_000, "stop", Usage(1, 1)))
    cache.flush()
    (file,) = tmp_path.rglob("*.val")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert cache.get(KEY) is None
    cache.close()
    assert (tmp_path / "elsewhere").exists()


def test_a_pickled_key_is_removed_when_the_cache_is_opened(tmp_path: Path) -> None:
    folder, marker = tmp_path / "answers-v1", tmp_path / "ran"
    open_cache(tmp_path).close()
    add_row(folder, key=harmful(marker), raw=0, value=b"x")
    cache = open_cache(tmp_path)
    cache.flush()
    assert rows(folder) == []
    assert not marker.exists()
    cache.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("disk_evil", 1),
        ("get", "not callable"),
        ("set", 5),
        ("size", "text"),
        ("sqlite_no such pragma;", "x"),
        ("eviction_policy", "none"),
        ("cull_limit", "many"),
        ("disk_min_file_size", "text"),
    ],
)
def test_planted_settings_do_no_harm(tmp_path: Path, name: str, value: object) -> None:
    open_cache(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "answers-v1" / "cache.db")) as database, database:
        database.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (name, value))
    cache = open_cache(tmp_path)
    for _ in range(3):
        cache.put(KEY, ANSWER)
        cache.flush()
        found = cache.get(KEY)
        cache.flush()
    assert found == ANSWER
    cache.close()
    cache = open_cache(tmp_path)
    assert cache.get(KEY) == ANSWER
    cache.close()


@pytest.mark.parametrize("value", [None, (1, 2), ["a"], {"a": 1}, object(), True, 2**63, bytearray(b"x")], ids=repr)
def test_only_plain_values_are_stored(tmp_path: Path, value: object) -> None:
    disk = RawDisk(str(tmp_path))
    with pytest.raises(TypeError):
        disk.store(value, False)
    with pytest.raises(TypeError):
        disk.put(value)


@pytest.mark.parametrize("value", [b"bytes", "text", 5, 2.5])
def test_plain_values_come_back_through_the_library(tmp_path: Path, value: object) -> None:
    with diskcache.Cache(str(tmp_path), disk=RawDisk) as cache:
        cache.set(b"key", value)
        cache.set("key", value)
        assert cache.get(b"key") == cache.get("key") == value
        assert list(cache) == [b"key", "key"]
    with pytest.raises(ForeignValue):
        RawDisk(str(tmp_path)).get(b"key", False)
