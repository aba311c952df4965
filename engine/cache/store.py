"""One folder on disk behind a memory of what is still to be written; failures of the disk end here."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from engine.cache.database import (
    CACHE_ERRORS,
    Database,
    Inode,
    discard,
    inode_of,
    is_damage,
    open_database,
    sweep,
)
from engine.cache.disk import ForeignValue
from engine.cache.write_behind import WriteBehind

OPEN_WAIT_S = 2.0  # a disk slower than this is waited for in the background
CLOSE_TIMEOUT_S = 5.0
RETRY_S = 30.0  # after the folder could not be opened
READ_PAUSE_S = 1.0  # after a lookup failed: a locked database must not cost every request its time-out
COMPLAINT_S = 600.0

logger = logging.getLogger("engine.cache")


class Store[T]:
    """Values by key. Any thread may call; none waits for a write, and nothing that the disk does raises here.

    `encode(key, value)` gives the bytes to keep; `decode(key, blob)` the value again, or None for anything unexpected,
    which is then removed. Entries used least recently go first when `size_limit_bytes` is reached; SQLite's log adds
    up to 4 MiB to that.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size_limit_bytes: int,
        encode: Callable[[bytes, T], bytes],
        decode: Callable[[bytes, object], T | None],
    ) -> None:
        self._folder = folder
        self._size_limit = size_limit_bytes
        self._encode, self._decode = encode, decode
        self._database: Database | None = None
        self._pending: dict[bytes, T] = {}
        self._lock = threading.Lock()
        self._retry_at = self._read_at = 0.0
        self._complained_at = -COMPLAINT_S
        self._closed = False
        opened = threading.Event()
        self._thread = WriteBehind(f"cache-{folder.name}")
        self._submit("opened", _nothing)
        self._thread.submit(opened.set)
        self._submit("swept", sweep)
        opened.wait(OPEN_WAIT_S)

    def get(self, key: bytes) -> T | None:
        database = self._database
        pending = self._pending.get(key)
        if pending is not None:
            return pending
        if database is None or self._closed or time.monotonic() < self._read_at:
            return None
        try:
            blob = database.reader.get(key)
        except ForeignValue:
            self._submit("cleaned", lambda current: current.writer.delete(key))
            return None
        except CACHE_ERRORS as error:
            self._read_failed(database, error)
            return None
        if blob is None:
            return None
        value = self._decode(key, blob)
        change = _mark_used if value is not None else _delete
        self._submit("updated", lambda current: change(current, key))
        return value

    def put(self, key: bytes, value: T, *, nbytes: int, expiry_s: float | None) -> None:
        """Keep a value, soon; it is found from now on. Dropped when too much is waiting, or it is over the limit."""
        if nbytes > self._size_limit:
            return
        with self._lock:
            self._pending[key] = value
        if not self._thread.submit(lambda: self._write(key, value, expiry_s), nbytes):
            self._forget_pending(key, value)

    def flush(self, timeout_s: float) -> bool:
        return self._thread.flush(timeout_s)

    def close(self, timeout_s: float) -> bool:
        self._thread.submit(self._close_database)
        done = self._thread.close(timeout_s)
        self._closed = True
        return done

    def _submit(self, doing: str, change: Callable[[Database], object]) -> None:
        self._thread.submit(lambda: self._guard(doing, change))

    def _write(self, key: bytes, value: T, expiry_s: float | None) -> None:
        try:
            blob = self._encode(key, value)

            def change(database: Database) -> None:
                database.writer.set(key, blob, expire=expiry_s)
                if database.writer.volume() > self._size_limit:
                    database.writer.cull()

            self._guard("written", change)
        finally:
            self._forget_pending(key, value)

    def _forget_pending(self, key: bytes, value: T) -> None:
        with self._lock:
            if self._pending.get(key) is value:
                del self._pending[key]

    def _guard(self, doing: str, change: Callable[[Database], object]) -> None:
        """Change the database on the writing thread: the one place where its failures are dealt with."""
        before: Inode | None = None
        try:
            before = inode_of(self._folder)
            database = self._current(before)
            if database is not None:
                change(database)
        except CACHE_ERRORS as error:
            self._complain(doing, error)
            if self._database is None:
                self._retry_at = time.monotonic() + RETRY_S
            if is_damage(error):
                self._start_over(self._database.inode if self._database else before)

    def _current(self, inode: Inode | None) -> Database | None:
        """The database, opened anew if its file is not the one at that path any more."""
        if self._database is not None and inode is not None and self._database.inode == inode:
            return self._database
        if self._database is None and time.monotonic() < self._retry_at:
            return None
        self._close_database()
        return self._open_database()

    def _start_over(self, damaged: Inode | None) -> None:
        self._close_database()
        try:
            discard(self._folder, damaged)
            self._open_database()
            logger.info("the cache in %s was damaged and has been started anew", self._folder)
        except CACHE_ERRORS as error:
            self._retry_at = time.monotonic() + RETRY_S
            self._complain("started anew", error)

    def _open_database(self) -> Database:
        self._database = open_database(self._folder, self._size_limit)
        self._read_at = 0.0
        return self._database

    def _close_database(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            try:
                database.writer.close()
            except CACHE_ERRORS as error:
                self._complain("closed", error)

    def _read_failed(self, database: Database, error: Exception) -> None:
        self._complain("read", error)
        self._read_at = time.monotonic() + READ_PAUSE_S
        if is_damage(error):

            def start_over() -> None:
                if self._database is database:  # not yet done by an earlier job
                    self._start_over(database.inode)

            self._thread.submit(start_over)

    def _complain(self, doing: str, error: Exception) -> None:
        now = time.monotonic()
        if now - self._complained_at >= COMPLAINT_S:
            self._complained_at = now
            reason = str(error) or type(error).__name__
            logger.warning("the cache in %s could not be %s, going on without it: %s", self._folder, doing, reason)


def _nothing(_: Database) -> None:
    """Opening is all that is wanted."""


def _mark_used(database: Database, key: bytes) -> None:
    """A lookup through the writer notes the time of access; a value in a file is opened, not read."""
    found = database.writer.get(key, read=True)
    if hasattr(found, "close"):
        found.close()


def _delete(database: Database, key: bytes) -> None:
    database.writer.delete(key)
