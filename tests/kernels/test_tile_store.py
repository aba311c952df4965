"""Measured tiles on disk: what is kept, what is believed, and what happens to it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.kernels.search import Choice
from engine.kernels.tile_store import MOST_ATTEMPTS, Chip, TileStore
from engine.kernels.tiles import Product, candidates

ROOT = Path(__file__).parents[2]
CHIP = Chip("H100", 132, 227 * 1024, True, "2.11", "3.6", "0123")
GEMV = Product("gemv", 1, 2048, 1536, False)
GEMM = Product("int8", 32, 17920, 1536, True)
CHOICES = {GEMV: Choice([*candidates(GEMV)][3], 2.5e-6), GEMM: Choice(next(candidates(GEMM)), None)}


@pytest.fixture
def store(tmp_path: Path) -> TileStore:
    return TileStore(tmp_path / "kernels", CHIP, "bfloat16")


@pytest.fixture
def kept(store: TileStore) -> TileStore:
    with store.alone(1) as alone:
        assert alone
        assert store.begin()
        store.add(CHOICES)
    return store


def change(store: TileStore, **fields: Any) -> None:
    store.file.write_text(json.dumps(json.loads(store.file.read_text()) | fields))


def change_tile(store: TileStore, product: Product, **fields: Any) -> None:
    content = json.loads(store.file.read_text())
    (entry,) = (entry for entry in content["tiles"] if entry["n"] == product.n)
    entry |= fields
    store.file.write_text(json.dumps(content))


def test_what_was_added_is_read_by_the_next_start(kept: TileStore) -> None:
    again = TileStore(kept.file.parent, CHIP, "bfloat16")
    assert again.read([GEMV, GEMM]) == CHOICES
    assert again.read([GEMM]) == {GEMM: CHOICES[GEMM]}
    assert again.read([dataclasses.replace(GEMV, rows=2)]) == {}
    assert stat.S_IMODE(kept.file.parent.stat().st_mode) == 0o700


def test_other_activations_are_kept_beside(kept: TileStore) -> None:
    half = TileStore(kept.file.parent, CHIP, "float16")
    assert half.read(CHOICES) == {}
    half.add({GEMV: Choice([*candidates(GEMV)][1], 1e-6)})
    assert half.read(CHOICES)[GEMV].seconds == 1e-6
    assert kept.read(CHOICES) == CHOICES


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Chip)])
def test_another_chip_or_version_has_none(kept: TileStore, field: str) -> None:
    changed: dict[str, Any] = {field: 1 if isinstance(getattr(CHIP, field), int) else "other"}
    other = TileStore(kept.file.parent, dataclasses.replace(CHIP, **changed), "bfloat16")
    assert other.read(CHOICES) == {}


def test_a_file_of_another_chip_under_this_name_is_a_miss(kept: TileStore) -> None:
    other = TileStore(kept.file.parent, dataclasses.replace(CHIP, name="A100"), "bfloat16")
    kept.file.rename(other.file)
    assert other.read(CHOICES) == {}


@pytest.mark.parametrize(
    "damage",
    [b"", b"\0" * 100, b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 1}', b"[" * 100_000],
    ids=["empty", "zeros", "cut", "list", "null", "not text", "no chip", "deep"],
)
def test_a_damaged_file_is_a_miss_and_is_written_anew(kept: TileStore, damage: bytes) -> None:
    kept.file.write_bytes(damage)
    assert kept.read(CHOICES) == {}
    assert kept.begin()
    kept.add(CHOICES)
    assert kept.read(CHOICES) == CHOICES


def test_a_file_cut_off_anywhere_is_a_miss(kept: TileStore) -> None:
    data = kept.file.read_bytes()
    for length in range(0, len(data) - 1, 7):
        kept.file.write_bytes(data[:length])
        assert kept.read(CHOICES) == {}


@pytest.mark.parametrize("tiles", [None, 3, {}, [3], [{}], [[]], [{"kernel": [], "rows": 1}]])
def test_entries_of_another_make_are_misses(kept: TileStore, tiles: object) -> None:
    change(kept, tiles=tiles)
    assert kept.read(CHOICES) == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"tile": None}, {"tile": []}, {"tile": {"outputs": 4}}, {"seconds": "1"}, {"seconds": -1.0}, {"seconds": 1e9},
        {"seconds": float("nan")}, {"rows": "1"}, {"tile": dataclasses.asdict(CHOICES[GEMM].tile)},
    ],
)  # fmt: skip
def test_an_entry_that_cannot_have_been_measured_is_a_miss_alone(kept: TileStore, fields: dict[str, Any]) -> None:
    change_tile(kept, GEMV, **fields)
    assert kept.read(CHOICES) == {GEMM: CHOICES[GEMM]}


def test_a_tile_that_needs_more_shared_memory_than_there_is_is_a_miss(kept: TileStore) -> None:
    tile = dataclasses.asdict(next(candidates(GEMM))) | {"stages": 40}
    change_tile(kept, GEMM, tile=tile)
    assert kept.read(CHOICES) == {GEMV: CHOICES[GEMV]}


def test_two_stores_add_beside_each_other(kept: TileStore) -> None:
    other, product = TileStore(kept.file.parent, CHIP, "bfloat16"), dataclasses.replace(GEMV, rows=4)
    choice = Choice(next(candidates(product)), 3e-6)
    other.add({product: choice})
    assert kept.read([*CHOICES, product]) == CHOICES | {product: choice}


def test_one_of_many_threads_is_alone_at_a_time(store: TileStore) -> None:
    inside, most = [0], [0]

    def enter() -> None:
        with store.alone(20) as alone:
            assert alone
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.02)
            inside[0] -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_whoever_waits_too_long_goes_on_without(store: TileStore) -> None:
    with store.alone(1) as first, store.alone(0.2) as second:
        assert first
        assert not second


PROCESS = """
import sys
from pathlib import Path
from engine.kernels.search import Choice
from engine.kernels.tile_store import TileStore
from engine.kernels.tiles import Product, candidates
from tests.kernels.test_tile_store import CHIP
store, first = TileStore(Path(sys.argv[1]), CHIP, "bfloat16"), int(sys.argv[2])
print("ready", flush=True)
for rows in range(first, first + 400):
    product = Product("int8", rows, 2048, 1536, False)
    with store.alone(60) as alone:
        assert alone
        store.add({product: Choice(next(candidates(product)), 1e-6)})
"""


def process(folder: Path, first: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), str(first)]
    started = subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def test_processes_killed_while_they_add_leave_a_whole_file_and_no_lock(store: TileStore) -> None:
    folder = store.file.parent
    for pause in (0.05, 0.3):
        both = [process(folder, 1), process(folder, 1001)]
        threading.Event().wait(pause)
        for one in both:
            os.kill(one.pid, signal.SIGKILL)
            one.communicate()
    with store.alone(1) as alone:
        assert alone
        store.add(CHOICES)
    assert json.loads(store.file.read_text())["tiles"]
    products = [Product("int8", rows, 2048, 1536, False) for first in (1, 1001) for rows in range(first, first + 400)]
    found = store.read(products)
    for first in (1, 1001):
        rows = sorted(product.rows for product in found if product.rows in range(first, first + 400))
        assert rows == list(range(first, first + len(rows))), "nobody's entries are lost"
    assert store.read(CHOICES) == CHOICES
    assert {path.name for path in folder.iterdir()} == {store.file.name, "tuning.lock"}, "nothing is left over"


def test_attempts_that_ended_their_process_are_not_repeated_for_ever(
    store: TileStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.file.parent.mkdir()
    for _ in range(MOST_ATTEMPTS):
        assert store.begin()
    assert not store.begin()
    assert f"remove {store.file} to try again" in caplog.text
    store.file.unlink()
    assert store.begin()
    store.add(CHOICES)
    assert store.begin(), "an attempt that came to its end does not count"
    assert store.read(CHOICES) == CHOICES


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_logged(store: TileStore, caplog: pytest.LogCaptureFixture) -> None:
    folder = store.file.parent
    folder.mkdir(mode=0o500)
    with store.alone(1) as alone:
        assert not alone
    assert not store.begin()
    assert "cannot be written" in caplog.text


def test_a_folder_that_is_a_file_is_logged(store: TileStore, caplog: pytest.LogCaptureFixture) -> None:
    store.file.parent.write_bytes(b"")
    with store.alone(1) as alone:
        assert not alone
    assert store.read(CHOICES) == {}
    assert not store.begin()
    assert "cannot be written" in caplog.text
