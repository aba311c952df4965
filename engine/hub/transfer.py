"""One file from a hub into a folder: resumed where it broke off, and there only when its hash holds."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import httpx

from engine.errors import Cancelled, DownloadFailed
from engine.hub.listing import RemoteFile, require_success
from engine.hub.progress import ProgressFile

RETRIES = 5  # in a row without a new byte
PAUSE_S = 1.0  # before the first of them; doubled each time
_BLOCK_BYTES = 1 << 20


class _TooLong(Exception):
    """The hub sent more than the listing said."""


def fetch(
    client: httpx.Client, file: RemoteFile, folder: Path, repository: str, progress: ProgressFile, stop: threading.Event
) -> None:
    """Leaves `folder`/`file.path` with the listed hash, or raises.

    What came so far is kept as `<path>.<start of the hash>.part`: another version of the file is never continued.
    Raises DownloadFailed, Cancelled when `stop` is set, and OSError.
    """
    target = folder / file.path
    if target.exists():
        if _holds(target, file):
            progress.found(file.size)
            return
        target.unlink()
    for _ in range(2):  # a part left by a crash may be wrong: once more from its first byte
        with _Part(folder / part_name(file), file, progress) as part:
            complete = _complete(client, part, repository, stop)
        if complete:
            part.path.replace(target)
            return
        part.path.unlink()
        progress.found(-part.size)
    raise DownloadFailed(
        f"{file.path} of {repository} came twice with another hash than the hub announces; something on the way changes"
        " files, or the hub is being updated: try again later, or set another hub_endpoint in the form"
    )


def part_name(file: RemoteFile) -> str:
    return f"{file.path}.{file.digest[:16]}.part"


def _holds(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    digest = _hash(file)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return bool(digest.hexdigest() == file.digest)


def _hash(file: RemoteFile) -> Any:
    """sha256 of the bytes, or git's name for them: the sha1 of a header with the size, and the bytes."""
    if file.hash_name == "sha256":
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


class _Part:
    """What has come of a file, and its hash so far."""

    def __init__(self, path: Path, file: RemoteFile, progress: ProgressFile) -> None:
        self.path, self.file, self.size = path, file, 0
        self._progress = progress
        self._digest = _hash(file)
        self._stream = path.open("a+b")
        self._stream.seek(0)
        while block := self._stream.read(_BLOCK_BYTES):
            self._digest.update(block)
            self.size += len(block)
        progress.found(self.size)
        if self.size > file.size:
            self.restart()

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def restart(self) -> None:
        self._stream.truncate(0)
        self._progress.found(-self.size)
        self._digest, self.size = _hash(self.file), 0

    def write(self, data: bytes) -> None:
        if self.size + len(data) > self.file.size:
            raise _TooLong
        self._stream.write(data)  # at the end: the stream appends
        self._digest.update(data)
        self.size += len(data)
        self._progress.fetched(len(data))

    def is_right(self) -> bool:
        """Also writes everything through to the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return bool(self._digest.hexdigest() == self.file.digest)


def _complete(client: httpx.Client, part: _Part, repository: str, stop: threading.Event) -> bool:
    """Fetch the rest; whether the hash holds. Raises DownloadFailed when the line breaks off again and again."""
    failures, furthest = 0, part.size
    while part.size < part.file.size:
        try:
            _append(client, part, repository, stop)
            problem = "it ends early"
        except _TooLong:
            return False
        except httpx.RequestError as error:
            problem = f"{type(error).__name__}: {error}".rstrip(": ")
        failures = 0 if part.size > furthest else failures + 1
        furthest = max(furthest, part.size)  # a hub that starts over each time gets nowhere
        if failures > RETRIES:
            raise DownloadFailed(
                f"{part.file.path} of {repository} cannot be fetched ({problem}); check the network and hub_endpoint"
                " in the form. What came so far is kept: the next request goes on from there"
            )
        if part.size < part.file.size:
            stop.wait(PAUSE_S * 2**failures)
    return part.is_right()


def _append(client: httpx.Client, part: _Part, repository: str, stop: threading.Event) -> None:
    headers = {"Range": f"bytes={part.size}-"} if part.size else {}
    with client.stream("GET", part.file.url, headers=headers) as response:
        if part.size and not _continues(response, part.size):
            part.restart()
            if response.status_code != 200:
                return  # asked again, from the first byte
        require_success(response, repository)
        for data in response.iter_bytes():
            if stop.is_set():
                raise Cancelled("the download was stopped; the next request goes on with it")
            part.write(data)


def _continues(response: httpx.Response, offset: int) -> bool:
    """Whether the body starts at `offset`; an error, which says nothing about ranges, leaves the part as it is."""
    if response.status_code == 206:
        return str(response.headers.get("Content-Range")).startswith(f"bytes {offset}-")
    return response.status_code not in (200, 416)
