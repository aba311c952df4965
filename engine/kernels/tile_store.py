"""Measured tiles on disk: one JSON file for each chip and version of what computes, in the storage folder.

A file that is damaged, foreign or of another format is none. Nothing in it is believed: a tile that is not among its
product's candidates was not measured.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from engine.files import replace_file
from engine.kernels.search import Choice
from engine.kernels.tiles import Product, candidates

FORMAT = 1
MOST_BYTES = 1 << 22
MOST_ATTEMPTS = 2  # that ended with their process: a third might as well
LOCK = "tuning.lock"
_POLL_S = 0.1
_log = logging.getLogger("engine.kernels")


@dataclass(frozen=True, slots=True)
class Chip:
    """What tiles were measured on: their times hold nowhere else. `shared_bytes` is what a program may have, `bulk`
    whether an engine copies tiles for it.
    """

    name: str
    multiprocessors: int
    shared_bytes: int
    bulk: bool
    torch: str
    triton: str
    sources: str  # checksum of the kernels

    @property
    def file_name(self) -> str:
        text = json.dumps([FORMAT, *astuple(self)])
        return f"tiles-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


class TileStore:
    """Choices for one chip and type of activations, in a file of `folder`, which any number of processes share."""

    def __init__(self, folder: Path, chip: Chip, activations: str) -> None:
        self._folder, self._chip, self._activations = folder, chip, activations
        self.file = folder / chip.file_name

    def read(self, products: Iterable[Product]) -> dict[Product, Choice]:
        """Those of the products that are there."""
        kept = self._entries()
        found = ((product, self._choice(product, kept.get(self._key(product)))) for product in products)
        return {product: choice for product, choice in found if choice is not None}

    def begin(self) -> bool:
        """Inside `alone`, before anything is measured; False where nothing should be.

        That is where it cannot be kept, and where attempts to measure have ended their processes: what ends CUDA for a
        process would do so at every start.
        """
        attempts = self._attempts()
        if attempts < MOST_ATTEMPTS:
            return self._write(self._entries(), attempts + 1)
        _log.warning("kernels are not tuned: that was cut off %d times; remove %s to try again", attempts, self.file)
        return False

    def add(self, choices: Mapping[Product, Choice]) -> None:
        """Beside what is there, inside `alone`."""
        new = {self._key(product): {"tile": asdict(c.tile), "seconds": c.seconds} for product, c in choices.items()}
        self._write(self._entries() | new, attempts=0)

    def _write(self, entries: Mapping[tuple[Any, ...], Mapping[str, Any]], attempts: int) -> bool:
        tiles = [{**dict(zip(_KEY, key, strict=True)), **entries[key]} for key in sorted(entries, key=str)]
        content = {"format": FORMAT, "chip": asdict(self._chip), "attempts": attempts, "tiles": tiles}
        try:
            self._replace(json.dumps(content, indent=1).encode())
        except OSError as error:
            _log.warning("measured kernels cannot be kept: %s cannot be written (%s)", self.file, error.strerror)
            return False
        return True

    @contextlib.contextmanager
    def alone(self, timeout: float) -> Iterator[bool]:
        """Whether nobody else, of any thread or process, is in here; False too where the folder cannot be written.

        A process that ends, however, is out.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            _log.warning("kernels are not tuned: %s cannot be written (%s)", self._folder, error.strerror)
            yield False
            return
        try:
            taken = _lock(descriptor, timeout)
            if not taken:
                _log.warning("kernels are not tuned: %s is held by another start or has no locks", self._folder / LOCK)
            yield taken
        finally:
            os.close(descriptor)

    def _key(self, product: Product) -> tuple[Any, ...]:
        return (self._activations, *astuple(product))

    def _choice(self, product: Product, entry: Mapping[str, Any] | None) -> Choice | None:
        if entry is None:
            return None
        possible = candidates(product, self._chip.shared_bytes, bulk=self._chip.bulk)
        fits = (tile for tile in possible if asdict(tile) == entry.get("tile"))
        tile, seconds = next(fits, None), entry.get("seconds")
        positive = isinstance(seconds, float) and 0 < seconds < 1
        return Choice(tile, seconds) if tile is not None and (seconds is None or positive) else None

    def _entries(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """By key, as they are in the file."""
        tiles = self._content().get("tiles")
        known = [entry for entry in tiles if _is_entry(entry)] if isinstance(tiles, list) else []
        return {tuple(entry[name] for name in _KEY): {name: entry.get(name) for name in _VALUE} for entry in known}

    def _attempts(self) -> int:
        attempts = self._content().get("attempts")
        return attempts if isinstance(attempts, int) else 0

    def _content(self) -> dict[str, Any]:
        """Of a file that is this program's, else nothing."""
        try:
            with self.file.open("rb") as stream:
                content = json.loads(stream.read(MOST_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        expected = {"format": FORMAT, "chip": asdict(self._chip)}
        if not isinstance(content, dict) or {name: content.get(name) for name in expected} != expected:
            return {}
        return content

    def _replace(self, data: bytes) -> None:
        """Under another name and renamed; such names that a killed process left behind are removed."""
        for leftover in self._folder.glob(f".{self.file.name}.*"):
            leftover.unlink(missing_ok=True)
        replace_file(self.file, data)


_KEY = ("activations", "kernel", "rows", "n", "k", "gate")
_VALUE = ("tile", "seconds")


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), str | int) for name in _KEY)


def _lock(descriptor: int, timeout: float) -> bool:
    end = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_S)
        except OSError:  # a file system without locks
            return False
        else:
            return True
