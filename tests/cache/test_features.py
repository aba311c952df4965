from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.cache import FeatureCache

KEY = b"k" * 32


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[FeatureCache]:
    cache = FeatureCache(tmp_path, size_limit_bytes=1 << 26)
    yield cache
    cache.close()


def features(tokens: int = 400, hidden: int = 96, dtype: type = np.float32) -> NDArray[np.floating]:
    return np.random.default_rng(tokens).standard_normal((tokens, hidden)).astype(dtype)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.val"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [1, 64, 2000])
def test_features_come_back_bit_for_bit_from_memory_and_from_disk(
    cache: FeatureCache, tokens: int, dtype: type
) -> None:
    array = features(tokens, dtype=dtype)
    cache.put(KEY, array)
    for _ in range(2):
        found = cache.get(KEY)
        assert found is not None
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert not found.flags.writeable
        cache.flush()


def test_what_was_put_is_a_copy(cache: FeatureCache) -> None:
    array = features()
    expected = array.copy()
    cache.put(KEY, array)
    array[:] = 0
    found = cache.get(KEY)
    assert found is not None
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros(2, np.float32), np.zeros((1, 2, 2), np.float32)])
def test_what_are_not_features_is_refused(cache: FeatureCache, array: NDArray[np.floating]) -> None:
    with pytest.raises(ValueError, match="features of shape"):
        cache.put(KEY, array)


def test_large_features_lie_in_a_file_and_small_ones_do_not(cache: FeatureCache, tmp_path: Path) -> None:
    cache.put(KEY, features(10))
    cache.flush()
    assert not files(tmp_path)
    cache.put(KEY, features(400))
    cache.flush()
    (file,) = files(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600
    cache.put(KEY, features(401))
    cache.flush()
    assert len(files(tmp_path)) == 1
    assert files(tmp_path) != [file]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty", "longer"])
def test_a_damaged_file_is_a_miss_and_is_removed(cache: FeatureCache, tmp_path: Path, damage: str) -> None:
    cache.put(KEY, features())
    cache.flush()
    (file,) = files(tmp_path)
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        file.write_bytes(
            {"truncated": content[:-1], "flipped": flipped, "empty": b"", "longer": content + b"\0"}[damage]
        )
    assert cache.get(KEY) is None
    cache.flush()
    assert not files(tmp_path)
    cache.put(KEY, features())
    cache.flush()
    assert cache.get(KEY) is not None


def test_evicted_features_take_their_files_with_them(tmp_path: Path) -> None:
    limit = 2 << 20
    cache = FeatureCache(tmp_path, size_limit_bytes=limit)
    for number in range(40):
        cache.put(number.to_bytes(4, "little"), features())
        cache.flush()
    assert 0 < sum(file.stat().st_size for file in files(tmp_path)) <= limit
    assert cache.get((39).to_bytes(4, "little")) is not None
    assert cache.get((0).to_bytes(4, "little")) is None
    cache.close()


def test_files_that_a_killed_process_left_are_swept_once_they_are_old(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, size_limit_bytes=1 << 26)
    cache.put(KEY, features())
    cache.close()
    (kept,) = files(tmp_path)
    folder = tmp_path / "features-v1" / "ab" / "cd"
    folder.mkdir(parents=True)
    old, new = folder / ("0" * 28 + ".val"), folder / ("1" * 28 + ".val")
    for path in (old, new):
        path.write_bytes(b"left over")
    for path in (old, kept):
        os.utime(path, (time.time() - 7200,) * 2)
    cache = FeatureCache(tmp_path, size_limit_bytes=1 << 26)
    cache.flush(5)
    assert files(tmp_path) == sorted([kept, new])
    assert cache.get(KEY) is not None
    cache.close()


def test_many_threads_read_and_write(cache: FeatureCache) -> None:
    arrays = {bytes([number]) * 32: features(50 + number * 20) for number in range(20)}
    wrong: list[bytes] = []

    def work() -> None:
        for key, array in arrays.items():
            cache.put(key, array)
            found = cache.get(key)
            if found is not None and not np.array_equal(found, array):
                wrong.append(key)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.flush(20)
    assert not wrong
    assert all(cache.get(key) is not None for key in arrays)
