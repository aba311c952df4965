"""The storage folder: weights, artifacts and caches, outside the plugin's own folder."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from engine.errors import StorageError


def open_storage(folder: Path) -> None:
    """Create the folder if need be and make sure that files can be written. Raises StorageError naming the fix."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # without a name: a kill leaves nothing behind
            probe.write(b"tessera")
            probe.flush()
    except OSError as error:
        raise storage_error(folder, error) from error


def storage_error(path: Path, error: OSError) -> StorageError:
    """Say in one sentence what the operating system refused and what to change."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(f"no space left for {path}; free some, or name another storage folder in the form")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageError(f"{path} cannot be written ({error.strerror}); name a writable storage folder in the form")
    return StorageError(f"{path} cannot be used as storage ({error.strerror}); name another storage folder in the form")
