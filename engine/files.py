"""Files that are there as a whole or not at all, and locks that die with their holder."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO


def replace_file(file: Path, data: bytes) -> None:
    """Write under another name (`file`'s behind a dot), sync, and rename. Raises OSError, and leaves nothing."""
    descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(partial).replace(file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until what was written to a file, or renamed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(lock: IO[bytes]) -> bool:
    """Take an open file's lock unless another process has it. The system releases it when the file is closed, or its
    process dies, however it dies.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
