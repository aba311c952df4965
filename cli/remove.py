"""./tessera remove: take a model off the disk, with everything that was made of it."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cli.list_models import artifacts_of, size_of
from engine.catalog import BUNDLED, known_models, model_name
from engine.config import EngineConfig
from engine.errors import CheckpointError, EngineError, InvalidRequest, UnknownModel
from engine.files import take_lock
from engine.hub.progress import lock_file, partial_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="its name in ./tessera list; a repository's name does as well")
    parser.add_argument(
        "--converted", action="store_true", help="only what was converted; it is made again when needed"
    )
    parser.add_argument("--storage", type=Path, help="storage folder (default: the engine's)")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when it is gone. An engine that has it loaded goes on with what it has."""
    try:
        settings = {"storage": arguments.storage and arguments.storage.expanduser().absolute()}
        storage = EngineConfig.from_mapping(settings).storage
        freed = remove(arguments.model, storage, only_converted=arguments.converted)
    except (EngineError, OSError) as error:
        print(f"tessera remove: {error}", file=sys.stderr)
        return 1
    print(f"{freed / 1e6:.1f} MB freed")
    return 0


def remove(name: str, storage: Path, *, only_converted: bool = False) -> int:
    """Bytes that were freed. Raises UnknownModel, and InvalidRequest for a model that may not go now."""
    folder_name = model_name(name, storage)
    folder, partial = known_models(storage).get(folder_name), partial_folder(folder_name, storage)
    if folder is None and not partial.exists():
        raise UnknownModel(f"there is no model {name!r} in {storage}; ./tessera list shows those that are")
    if folder_name in BUNDLED and not only_converted:
        raise InvalidRequest(f"{name} is part of the package; --converted removes what was converted of it")
    gone = []
    if folder is not None:
        with suppress(CheckpointError):  # of an unreadable one nothing was converted under this digest
            gone += artifacts_of(folder, storage)
    if only_converted:
        return _removed(gone)
    with _not_downloading(lock_file(folder_name, storage), name):
        if folder is not None:
            doomed = folder.with_name(f".{folder.name}.removed")  # no longer a model from one moment to the next
            folder.rename(doomed)
            gone.append(doomed)
        return _removed([*gone, partial])


@contextmanager
def _not_downloading(file: Path, name: str) -> Iterator[None]:
    with file.open("wb") as lock:
        if not take_lock(lock):
            raise InvalidRequest(f"{name} is being downloaded; stop that first, or wait for its end")
        yield


def _removed(folders: list[Path]) -> int:
    freed = 0
    for folder in folders:
        if folder.exists():
            freed += size_of(folder)
            shutil.rmtree(folder)
    return freed
