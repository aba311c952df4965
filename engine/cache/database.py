"""Opening a diskcache folder, telling damage from a passing failure, and starting over."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import diskcache  # type: ignore[import-untyped]
from diskcache.core import DBNAME, MODE_BINARY, MODE_RAW  # type: ignore[import-untyped]

from engine.cache.disk import ForeignValue, RawDisk

MIN_FILE_SIZE = 64 << 10  # bytes; smaller values lie in the database itself
CACHED_PAGES = 512  # of 4 KiB, in each thread's connection; the system keeps the file's pages for all of them
READ_TIMEOUT_S = 0.1
WRITE_TIMEOUT_S = 5.0
ORPHAN_AGE_S = 3600.0
CACHE_ERRORS = (OSError, sqlite3.Error, diskcache.Timeout, ValueError, TypeError, KeyError, AttributeError)
_FOREIGN = (ValueError, TypeError, KeyError, AttributeError)
_DAMAGE_CODES = frozenset(
    {
        sqlite3.SQLITE_ERROR,  # no such table or column
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_NOTADB,
    }
)

Inode = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Database:
    """Two views of one folder, and which file it was.

    A lookup through `writer` marks the entry as used, which takes the write lock; one through `reader` takes none.
    """

    writer: diskcache.Cache
    reader: diskcache.Cache
    inode: Inode | None


def open_database(folder: Path, size_limit_bytes: int) -> Database:
    """Open or create, readable by this user only. Raises one of CACHE_ERRORS; may wait for another process."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    settings = {
        "disk": RawDisk,
        "disk_min_file_size": MIN_FILE_SIZE,
        "eviction_policy": "least-recently-used",
        "size_limit": size_limit_bytes,
        "statistics": 0,  # would make every lookup a write
        "sqlite_cache_size": CACHED_PAGES,
        "sqlite_mmap_size": 0,  # a database truncated by somebody else is an error then, not a SIGBUS
        "sqlite_synchronous": 1,  # NORMAL: with a write-ahead log a power cut loses the last entries, never the file
    }
    writer = diskcache.Cache(str(folder), timeout=WRITE_TIMEOUT_S, **settings)
    reader = diskcache.Cache(str(folder), timeout=READ_TIMEOUT_S, **settings)
    reader.close()  # this thread's connection; each thread that reads opens its own
    reader.eviction_policy = "none"  # of this object only: its lookups then write nothing
    (folder / DBNAME).chmod(0o600)
    return Database(writer, reader, inode_of(folder))


def inode_of(folder: Path) -> Inode | None:
    """Which file the database is; None when there is none."""
    try:
        found = (folder / DBNAME).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def is_damage(error: BaseException) -> bool:
    """Whether the content of the database is at fault: trying again will not help, starting over will."""
    if isinstance(error, sqlite3.Error):
        return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGE_CODES
    return isinstance(error, _FOREIGN) and not isinstance(error, ForeignValue)


def discard(folder: Path, damaged: Inode | None) -> None:
    """Remove a folder whose database is the damaged file; do nothing if another process has replaced it already.

    The folder is renamed first, which is one step for every process that looks for it. SQLite notices in connections
    still open on it that their file has moved. Raises OSError.
    """
    with folder.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if inode_of(folder) != damaged:
            return
        aside = folder.with_name(f"{folder.name}.damaged-{os.getpid()}-{time.time_ns()}")
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(database: Database) -> None:
    """Remove what a killed process, or somebody else, left: files without a row, rows that no lookup can return.

    Only files older than ORPHAN_AGE_S: another process writes the file first and the row right after. Raises
    sqlite3.Error or OSError.
    """
    folder = Path(database.writer.directory)
    paths = [Path(base) / name for base, _, names in os.walk(folder) if Path(base) != folder for name in names]
    with closing(sqlite3.connect(folder / DBNAME, timeout=WRITE_TIMEOUT_S, isolation_level=None)) as connection:
        connection.execute(
            "DELETE FROM Cache WHERE raw IS NOT 1 OR mode IS NULL OR mode NOT IN (?, ?)", (MODE_RAW, MODE_BINARY)
        )
        known = {name for (name,) in connection.execute("SELECT filename FROM Cache WHERE filename IS NOT NULL")}
    oldest_kept = time.time() - ORPHAN_AGE_S
    for path in paths:
        if str(path.relative_to(folder)) not in known:
            with suppress(OSError):
                if path.lstat().st_mtime < oldest_kept:
                    path.unlink()
    for leftover in folder.parent.glob(f"{folder.name}.damaged-*"):
        shutil.rmtree(leftover, ignore_errors=True)
