from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.cache import Answer, AnswerCache
from engine.request import Usage

ANSWER = Answer("a circle, \u00e9\U0001f600 \ud83d", "length", Usage(700, 12, 64, 512))
HOUR = 3600.0


def open_cache(folder: Path, size_limit_bytes: int = 1 << 26, expiry_s: float = HOUR) -> AnswerCache:
    return AnswerCache(folder, size_limit_bytes=size_limit_bytes, expiry_s=expiry_s)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[AnswerCache]:
    cache = open_cache(tmp_path)
    yield cache
    cache.close()


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def size_of(folder: Path) -> int:
    """Bytes of values and database, without SQLite's log, which has a bound of its own."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".db", ".val"))


def test_an_answer_is_found_at_once_and_after_it_was_written(cache: AnswerCache) -> None:
    cache.put(key(1), ANSWER)
    assert cache.get(key(1)) == ANSWER
    assert cache.flush()
    assert cache.get(key(1)) == ANSWER
    assert cache.get(key(2)) is None


def test_an_answer_survives_a_restart(tmp_path: Path) -> None:
    for number in range(3):
        cache = open_cache(tmp_path)
        cache.put(key(number), ANSWER)
        assert cache.close()
    cache = open_cache(tmp_path)
    assert [cache.get(key(number)) for number in range(4)] == [ANSWER, ANSWER, ANSWER, None]
    cache.close()


@pytest.mark.parametrize("text", ["", "x" * 300_000], ids=["empty", "long"])
def test_answers_of_any_length_come_back(cache: AnswerCache, text: str) -> None:
    answer = Answer(text, "stop", Usage(1, 0))
    cache.put(key(1), answer)
    cache.flush()
    assert cache.get(key(1)) == answer


def test_a_connection_keeps_few_pages_of_a_large_database(cache: AnswerCache) -> None:
    cache.put(key(1), ANSWER)
    assert cache.flush()
    database = cache._store._database
    assert database is not None
    for connected in (database.writer, database.reader):
        (pages,), (size,) = (connected._sql(f"PRAGMA {name}").fetchone() for name in ("cache_size", "page_size"))
        assert pages * size <= 2 << 20


def test_a_new_answer_replaces_the_old_one(cache: AnswerCache) -> None:
    newer = Answer("newer", "stop", Usage(1, 1))
    cache.put(key(1), ANSWER)
    cache.put(key(1), newer)
    assert cache.get(key(1)) == newer
    cache.flush()
    assert cache.get(key(1)) == newer


def test_answers_expire(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, expiry_s=0.05)
    cache.put(key(1), ANSWER)
    cache.flush()
    time.sleep(0.06)
    assert cache.get(key(1)) is None
    cache.close()


def test_answers_of_one_moment_expire_at_different_moments(cache: AnswerCache, tmp_path: Path) -> None:
    before = time.time()
    for number in range(100):
        cache.put(key(number), ANSWER)
    cache.flush()
    spent = time.time() - before
    with sqlite3.connect(tmp_path / "answers-v1" / "cache.db") as database:
        ends = [end - before for (end,) in database.execute("SELECT expire_time FROM Cache")]
    assert len(set(ends)) == 100
    assert 0.9 * HOUR <= min(ends) < 0.94 * HOUR
    assert 1.06 * HOUR < max(ends) <= 1.1 * HOUR + spent


def test_the_folder_stays_within_its_limit_and_keeps_what_is_used(tmp_path: Path) -> None:
    limit = 1 << 20
    cache = open_cache(tmp_path, size_limit_bytes=limit)
    answer = Answer("y" * 20_000, "stop", Usage(1, 1))
    for number in range(150):
        cache.put(key(number), answer)
        assert cache.flush()
        assert cache.get(key(0)) == answer, "the one in use was evicted"
    kept = [number for number in range(150) if cache.get(key(number)) is not None]
    assert len(kept) >= 20
    assert kept[-10:] == list(range(140, 150))
    assert cache.close()
    assert size_of(tmp_path) <= limit
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.db-wal")) < 8 << 20


def test_an_answer_over_the_whole_limit_is_not_kept(tmp_path: Path) -> None:
    cache = open_cache(tmp_path, size_limit_bytes=1 << 16)
    cache.put(key(1), ANSWER)
    cache.put(key(2), Answer("z" * (1 << 17), "stop", Usage(1, 1)))
    cache.flush()
    assert cache.get(key(1)) == ANSWER
    assert cache.get(key(2)) is None
    cache.close()


def test_a_closed_cache_is_empty_and_takes_nothing(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.put(key(1), ANSWER)
    assert cache.close()
    assert cache.close()
    cache.put(key(2), ANSWER)
    assert cache.get(key(1)) is cache.get(key(2)) is None


def test_only_the_user_may_look(cache: AnswerCache, tmp_path: Path) -> None:
    assert (tmp_path / "answers-v1").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "answers-v1" / "cache.db").stat().st_mode & 0o777 == 0o600


def test_a_folder_left_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "answers-v1").mkdir(mode=0o777)
    open_cache(tmp_path).close()
    assert (tmp_path / "answers-v1").stat().st_mode & 0o777 == 0o700
