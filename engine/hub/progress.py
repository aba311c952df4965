"""How far a download is: written beside it by the process that downloads, read by everybody."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.catalog import catalog, find_checkpoint, folder_name, models_folder, repository_of
from engine.errors import UnknownModel
from engine.files import replace_file

WINDOW_S = 20.0  # over which the speed is taken
_PROGRESS = "progress.json"

State = Literal["here", "downloading", "absent", "unknown"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes, of the files that are needed; `rate` is bytes a second, 0 while unknown."""

    done: int
    total: int
    rate: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate > 0 else None

    def __str__(self) -> str:
        if not self.total:
            return "asking the hub"
        unit, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        left = self.seconds_left
        text = f"{self.done / unit:.1f} of {self.total / unit:.1f} {name}"
        return text if left is None else f"{text}, {_duration(left)} left"


@dataclass(frozen=True, slots=True)
class ModelState:
    """`here` has a `folder`, `downloading` a `progress`.

    `absent` could be downloaded; a name is `unknown` when it is neither a folder's nor a repository's.
    """

    state: State
    folder: Path | None = None
    progress: Progress | None = None


def model_state(name: str, storage: Path) -> ModelState:
    """What the disk says about a model; asks neither the engine nor the hub. Takes well under a millisecond."""
    with contextlib.suppress(UnknownModel):
        return ModelState("here", folder=find_checkpoint(name, storage))
    if repository_of(name) is None:
        return ModelState("unknown")
    folder = folder_name(name)
    if is_locked(lock_file(folder, storage)):
        return ModelState("downloading", progress=read_progress(partial_folder(folder, storage)))
    return ModelState("absent")


def label(name: str) -> str:
    """What people call a model: the catalogue's label, or the repository without its owner."""
    model = catalog().get(folder_name(name))
    return name.rpartition("/")[2] if model is None else model.label


def partial_folder(folder: str, storage: Path) -> Path:
    return models_folder(storage) / f".{folder}.partial"


def lock_file(folder: str, storage: Path) -> Path:
    return models_folder(storage) / f".{folder}.lock"


def is_locked(file: Path) -> bool:
    """Whether a living process holds the lock; the system releases it when that one dies, however it dies."""
    try:
        with file.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody has ever downloaded it, or may look
        return False
    return False


def read_progress(partial: Path) -> Progress:
    """What the downloading process wrote last; nothing yet, or nonsense, is no progress."""
    try:
        values = json.loads((partial / _PROGRESS).read_bytes())
        return Progress(int(values["done"]), int(values["total"]), float(values["rate"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Progress(0, 0)


class ProgressFile:
    """Counts bytes and writes how far it is into the partial folder, at most once a second."""

    def __init__(self, partial: Path, total: int) -> None:
        self.total = total
        self._file = partial / _PROGRESS
        self._done = 0
        self._seen: deque[tuple[float, int]] = deque()  # when, and bytes that came over the line by then
        self._fetched = 0
        self._written_at = float("-inf")

    def found(self, size: int) -> None:
        """`size` bytes were on the disk already; taken back with a negative size."""
        self._done += size
        self._write()

    def fetched(self, size: int) -> None:
        """`size` bytes came over the line."""
        self._done += size
        self._fetched += size
        self._write()

    @property
    def progress(self) -> Progress:
        first, last = (self._seen[0], self._seen[-1]) if self._seen else ((0.0, 0), (0.0, 0))
        seconds = last[0] - first[0]
        return Progress(self._done, self.total, (last[1] - first[1]) / seconds if seconds else 0.0)

    def _write(self) -> None:
        now = time.monotonic()
        if now - self._written_at < 1.0:
            return
        self._written_at = now
        self._seen.append((now, self._fetched))
        while self._seen[-1][0] - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()
        progress = self.progress
        values = {"done": progress.done, "total": progress.total, "rate": progress.rate}
        replace_file(self._file, json.dumps(values).encode())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
