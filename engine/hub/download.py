"""One repository from a hub to a whole folder under storage/models, once for all processes."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from engine.catalog import Repository, find_checkpoint, folder_name, models_folder
from engine.checkpoints.checkpoint import INDEX, WEIGHTS, read_config
from engine.config import EngineConfig
from engine.describe import CONFIG
from engine.errors import Cancelled, CheckpointError, DownloadFailed, StorageError, UnknownModel
from engine.families import family_for
from engine.files import replace_file, sync, take_lock
from engine.hub.listing import RemoteFile, Snapshot, list_files, open_client
from engine.hub.origin import require_repository
from engine.hub.progress import ProgressFile, lock_file, partial_folder
from engine.hub.transfer import PAUSE_S, fetch, part_name
from engine.storage import storage_error

RECORD = "tessera.json"  # where a folder came from
SPARE_BYTES = 64 << 20  # left on the disk beside the download
LOCK_POLL_S = 0.3
LISTING_RETRIES = 2  # few: somebody may be waiting to hear that the address is wrong

# What the engine and transformers' tokenizers and processors read. No code, no pickles.
_NEEDED = {
    CONFIG,
    INDEX,
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja"),
}


def download(name: str, config: EngineConfig, stop: threading.Event) -> Path:
    """The folder of a model, complete; blocks for as long as it takes.

    A second process waits for the first one's download, and goes on with it if that process dies. Raises
    DownloadFailed, StorageError, CheckpointError for a model that the engine does not run (before its weights are
    fetched), UnknownModel for a name that no hub can know or when downloads are off, and Cancelled.
    """
    repository, folder = require_repository(name, config), folder_name(name)
    target = models_folder(config.storage) / folder
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(lock_file(folder, config.storage), stop):
            with contextlib.suppress(UnknownModel):  # another process has fetched it meanwhile
                return find_checkpoint(name, config.storage)
            partial = partial_folder(folder, config.storage)
            partial.mkdir(mode=0o700, exist_ok=True)
            with open_client(config.hub_endpoint, config.hub_token) as client:
                _fill(client, config.hub_endpoint, repository, partial, stop)
            _put_in_place(partial, target)
    except OSError as error:
        raise storage_error(target, error) from error
    return target


@contextlib.contextmanager
def _locked(file: Path, stop: threading.Event) -> Iterator[None]:
    """Holds the download's lock."""
    with file.open("wb") as lock:
        while not take_lock(lock):
            if stop.wait(LOCK_POLL_S):
                raise Cancelled("the wait for another process's download was stopped")
        yield


def _fill(client: httpx.Client, endpoint: str, repository: Repository, partial: Path, stop: threading.Event) -> None:
    """Everything but the weights first: whether the engine runs such a model is known before gigabytes are fetched."""
    snapshot = _listed(client, endpoint, repository, stop)
    needed = _needed_of(snapshot)
    small = [file for path, file in sorted(snapshot.files.items()) if path in needed]
    weights = _announced_weights(snapshot)
    _sweep(partial, [*small, *weights])
    progress = ProgressFile(partial, sum(file.size for file in (*small, *weights)))
    for file in small:
        fetch(client, file, partial, snapshot.repository, progress, stop)
    try:
        model = read_config(partial)
        family_for(model.model).spec(model)
    except CheckpointError as error:
        shutil.rmtree(partial)
        raise CheckpointError(f"{snapshot.repository}: {str(error).replace(f'{partial}/', '')}") from error
    if INDEX in snapshot.files:
        weights = _indexed_weights(partial, snapshot)
        progress.total = sum(file.size for file in (*small, *weights))
    _require_space(partial, repository, weights)
    for file in weights:
        fetch(client, file, partial, snapshot.repository, progress, stop)
    _record(partial, endpoint, snapshot, [*small, *weights])


def _listed(client: httpx.Client, endpoint: str, repository: Repository, stop: threading.Event) -> Snapshot:
    for attempt in range(LISTING_RETRIES + 1):
        try:
            return list_files(client, endpoint, repository)
        except httpx.RequestError as error:
            problem = f"{type(error).__name__}: {error}".rstrip(": ")
        if stop.wait(PAUSE_S * 2**attempt if attempt < LISTING_RETRIES else 0):
            raise Cancelled("the download was stopped; the next request goes on with it")
    raise DownloadFailed(
        f"{endpoint} cannot be reached ({problem}); check hub_endpoint in the form and the network, or copy the model's"
        " folder to storage/models by hand"
    )


def _needed_of(snapshot: Snapshot) -> set[str]:
    return _NEEDED if "tokenizer.json" in snapshot.files else _NEEDED | {"tokenizer.model"}


def _announced_weights(snapshot: Snapshot) -> list[RemoteFile]:
    """All that may be needed; the index, where there is one, says later which they are."""
    if INDEX in snapshot.files:
        return [file for path, file in sorted(snapshot.files.items()) if path.endswith(".safetensors")]
    if WEIGHTS not in snapshot.files:
        raise DownloadFailed(
            f"{snapshot.repository} has no {WEIGHTS} and no {INDEX}; only safetensors files are read, choose a"
            " repository that has them"
        )
    return [snapshot.files[WEIGHTS]]


def _indexed_weights(partial: Path, snapshot: Snapshot) -> list[RemoteFile]:
    try:
        names = sorted({str(name) for name in json.loads((partial / INDEX).read_bytes())["weight_map"].values()})
        missing = [name for name in names if not (name in snapshot.files and name.endswith(".safetensors"))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DownloadFailed(f"{INDEX} of {snapshot.repository} has no weight_map ({error})") from error
    if missing or not names:
        raise DownloadFailed(f"{snapshot.repository} lacks {', '.join(missing) or 'weights'}, says its {INDEX}")
    return [snapshot.files[name] for name in names]


def _sweep(partial: Path, files: list[RemoteFile]) -> None:
    """Remove what another version of the repository left."""
    kept = {name for file in files for name in (file.path, part_name(file))}
    for path in partial.iterdir():
        if path.name not in kept:
            path.unlink()


def _require_space(partial: Path, repository: Repository, files: list[RemoteFile]) -> None:
    names = [name for file in files for name in (file.path, part_name(file))]
    there = sum((partial / name).stat().st_size for name in names if (partial / name).exists())
    missing = sum(file.size for file in files) - there
    free = shutil.disk_usage(partial).free
    if missing > 0 and missing + SPARE_BYTES > free:
        raise StorageError(
            f"{repository.name} needs {missing / 1e9:.1f} GB more, but {partial.parent} has {free / 1e9:.1f} GB free;"
            " free some, or name another storage folder in the form"
        )


def _record(partial: Path, endpoint: str, snapshot: Snapshot, files: list[RemoteFile]) -> None:
    """Where the folder came from, for people and for `./tessera list`."""
    record = {
        "hub": endpoint,
        "repository": snapshot.repository,
        "revision": snapshot.revision,
        "files": {file.path: f"{file.hash_name}:{file.digest}" for file in files},
    }
    _sweep(partial, files)  # the progress file too: the folder is a checkpoint from now on
    replace_file(partial / RECORD, json.dumps(record, indent=1).encode())


def _put_in_place(partial: Path, target: Path) -> None:
    if target.exists():  # somebody has copied it there meanwhile
        shutil.rmtree(partial)
        return
    sync(partial)
    partial.rename(target)
    sync(target.parent)
