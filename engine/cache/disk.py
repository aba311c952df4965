"""diskcache without pickle: what it may write to and believe from its folder.

diskcache 5.6.3 unpickles values that its database marks as pickled (CVE-2025-69872) and opens and deletes whatever file
name a row holds. This Disk stores bytes, text and numbers as they are, and touches files of its own naming only.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import diskcache  # type: ignore[import-untyped]
from diskcache.core import MODE_BINARY, MODE_RAW, UNKNOWN  # type: ignore[import-untyped]

_FILE_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{28}\.val", re.ASCII)
_PLAIN = (bytes, str, int, float)
_ATTEMPTS = 10  # another process may delete an empty folder just before a file is made in it

StoredRow = tuple[int, int, str | None, bytes | str | int | float | None]


class ForeignValue(ValueError):
    """A row or file that this program did not write."""


class RawDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache is untyped
    def put(self, key: object) -> tuple[object, bool]:
        _require_plain(key)
        return super().put(key)  # type: ignore[no-any-return]

    def get(self, key: object, raw: object) -> object:
        if not raw or type(key) not in _PLAIN:
            raise ForeignValue("a key that is not bytes, text or a number")
        return key

    def store(self, value: object, read: bool, key: object = UNKNOWN) -> StoredRow:
        """Size, mode, file name and inline value of a new row. Raises OSError; then no file is left behind."""
        if read:
            raise TypeError("values are bytes, text or numbers, not files")
        _require_plain(value)
        if not isinstance(value, bytes) or len(value) < self.min_file_size:
            return 0, MODE_RAW, None, value  # type: ignore[return-value]
        name, path = self.filename(key, value)
        _write_new(Path(path), value)
        return len(value), MODE_BINARY, name, None

    def fetch(self, mode: object, filename: object, value: object, read: bool) -> object:
        """The value of a row, or its open file if `read`. Raises ForeignValue, or OSError if the file is gone."""
        if mode == MODE_RAW and filename is None and type(value) in _PLAIN:
            return value
        if mode != MODE_BINARY or not _is_own(filename):
            raise ForeignValue(f"a row of mode {mode!r} and file {filename!r}")
        file = _open_regular(Path(self._directory) / str(filename))
        if read:
            return file
        with file:
            return file.read()

    def remove(self, file_path: object) -> None:
        if _is_own(file_path):
            super().remove(file_path)


def _require_plain(value: object) -> None:
    if type(value) not in _PLAIN:
        raise TypeError(f"only bytes, text and numbers are kept on disk, not {type(value).__name__}")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise TypeError(f"{value} does not fit 64 bits")


def _is_own(filename: object) -> bool:
    return isinstance(filename, str) and _FILE_NAME.fullmatch(filename) is not None


def _open_regular(path: Path) -> BinaryIO:
    """Open for reading, neither following a link nor waiting for a pipe."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ForeignValue(f"{path.name} is not a plain file")
    return file


def _write_new(path: Path, value: bytes) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            break
        except FileNotFoundError:
            if attempt == _ATTEMPTS:
                raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(value)
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise
