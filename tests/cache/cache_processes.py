"""What other processes do to a cache folder in tests; each function runs in an interpreter of its own."""

from __future__ import annotations

import hashlib
import os
import resource
import sys
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.cache import Answer, AnswerCache, FeatureCache
from engine.request import Usage

KEYS = 400


def open_caches(folder: Path) -> tuple[AnswerCache, FeatureCache]:
    answers = AnswerCache(folder, size_limit_bytes=4 << 20, expiry_s=3600)
    return answers, FeatureCache(folder, size_limit_bytes=16 << 20)


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def answer(number: int) -> Answer:
    return Answer(f"{number} " * (number * 7 % 3000), "stop", Usage(number, 1))


def features(number: int) -> NDArray[np.floating]:
    return np.random.default_rng(number).standard_normal((number % 7 * 64 + 1, 96)).astype(np.float32)


def wrong_values(answers: AnswerCache, images: FeatureCache) -> tuple[list[int], int]:
    """Keys that hold anything but their value, and how many hold theirs."""
    wrong, right = [], 0
    for number in range(KEYS):
        text, array = answers.get(key(number)), images.get(key(number))
        right += (text is not None) + (array is not None)
        if text not in (None, answer(number)) or not (array is None or np.array_equal(array, features(number))):
            wrong.append(number)
    return wrong, right


def write_for_ever(folder: Path, seed: int) -> None:
    answers, images = open_caches(folder)
    numbers = np.random.default_rng(seed)
    for turn in count():
        number = int(numbers.integers(KEYS))
        answers.put(key(number), answer(number))
        images.put(key(number), features(number))
        if turn == 5:
            print("writing", flush=True)
        if turn % 20 == 0:
            answers.flush()
            images.flush()


def write_and_check(folder: Path, seed: int) -> None:
    answers, images = open_caches(folder)
    numbers = np.random.default_rng(seed)
    for _ in range(300):
        number = int(numbers.integers(KEYS))
        answers.put(key(number), answer(number))
        images.put(key(number), features(number))
        read = int(numbers.integers(KEYS))
        if answers.get(key(read)) not in (None, answer(read)):
            sys.exit(f"a wrong answer for {read}")
        array = images.get(key(read))
        if array is not None and not np.array_equal(array, features(read)):
            sys.exit(f"wrong features for {read}")
    sys.exit(0 if answers.close(20) and images.close(20) else "not all was written")


def use_without_space(folder: Path) -> None:
    """No file may grow beyond 200 KB: what a full disk does to SQLite and to files alike."""
    answers, images = open_caches(folder)
    answers.put(key(1), answer(1))
    answers.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    for number in range(2, 300):
        answers.put(key(number), answer(number))
        images.put(key(number), np.ones((1000, 96), np.float32))
    answers.flush(30)
    images.flush(30)
    assert answers.get(key(1)) == answer(1)
    assert images.get(key(2)) is None
    assert not list(folder.rglob("*.val")), "half a file was left"
    answers.close()
    images.close()


def use_read_only(folder: Path) -> None:
    """The caller filled answers-v1 for key 1 and left the folders without permission to write."""
    image = features(2)  # before the interpreter's own files may be out of reach
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    answers, images = open_caches(folder)
    answers.put(key(2), answer(2))
    images.put(key(2), image)
    answers.flush(30)
    images.flush(30)
    assert answers.get(key(2)) is None
    assert images.get(key(2)) is None
    answers.close()
    images.close()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
