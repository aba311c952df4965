"""Several real processes on one folder, some of which are killed in the middle of a write."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.cache.cache_processes import KEYS, answer, key, open_caches, wrong_values

SCRIPT = Path(__file__).with_name("cache_processes.py")
ROOT = SCRIPT.parents[2]


def start(function: str, folder: Path, *args: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), function, str(folder), *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it logged; fails unless it ended well."""
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    return log


def assert_intact(folder: Path) -> None:
    for name in ("answers-v1", "features-v1"):
        with closing(sqlite3.connect(folder / name / "cache.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("rounds", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_processes_killed_while_writing_corrupt_nothing(tmp_path: Path, rounds: int) -> None:
    moments = random.Random(rounds)
    answers, images = open_caches(tmp_path)
    inodes = [(tmp_path / name / "cache.db").stat().st_ino for name in ("answers-v1", "features-v1")]
    for turn in range(0, rounds, 2):
        victims = [start("write_for_ever", tmp_path, turn + number) for number in range(2)]
        for victim in victims:
            assert victim.stdout is not None
            assert victim.stdout.readline() == "writing\n"
        for victim in victims:
            time.sleep(moments.uniform(0.0, 0.15))
            victim.kill()
        for victim in victims:
            victim.communicate()
        wrong, _ = wrong_values(answers, images)
        assert not wrong
        answers.put(key(turn), answer(turn))
        assert answers.flush(20)
        assert answers.get(key(turn)) == answer(turn)
    assert answers.close(20)
    assert images.close(20)
    assert_intact(tmp_path)
    assert inodes == [(tmp_path / name / "cache.db").stat().st_ino for name in ("answers-v1", "features-v1")]
    wrong, right = wrong_values(*open_caches(tmp_path))
    assert not wrong
    assert right > 20


def test_processes_share_a_folder(tmp_path: Path) -> None:
    for process in [start("write_and_check", tmp_path, seed) for seed in range(3)]:
        finish(process)
    assert_intact(tmp_path)
    wrong, right = wrong_values(*open_caches(tmp_path))
    assert not wrong
    assert right > KEYS // 10


def test_a_full_disk_is_reported_once_and_reading_goes_on(tmp_path: Path) -> None:
    log = finish(start("use_without_space", tmp_path))
    assert log.count("going on without it") == 2, "one for each cache"
    assert "Traceback" not in log


@pytest.mark.parametrize("filled", [True, False], ids=["filled", "never made"])
def test_a_read_only_folder_is_reported_once(filled: bool) -> None:
    folder = Path(tempfile.mkdtemp(prefix="cache-"))  # pytest's own folders are closed to other users
    try:
        if filled:
            answers, images = open_caches(folder)
            answers.put(key(1), answer(1))
            answers.close()
            images.close()
        folder.chmod(0o555)
        for path in folder.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        log = finish(start("use_read_only", folder))
        assert log.count("going on without it") == 2, "one for each cache"
        assert "Traceback" not in log
    finally:
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o755)
        shutil.rmtree(folder)
