"""What a model that is not here yet can do: a few small files of its repository, for Dify's form, within seconds.

They stay in the folder that a download fills, where it finds them done.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import httpx

from engine.catalog import Repository, models_folder
from engine.config import EngineConfig
from engine.describe import CONFIG, FILES, Description, describe
from engine.errors import CheckpointError, DownloadFailed
from engine.files import replace_file, take_lock
from engine.hub.listing import list_files, open_client, require_success
from engine.hub.progress import lock_file, partial_folder
from engine.storage import storage_error

LIMIT_S = 6.0
_POLL_S = 0.1


def preview(repository: Repository, folder: str, config: EngineConfig, limit_s: float = LIMIT_S) -> Description:
    """`folder` is the name that the download will have under storage/models.

    Raises DownloadFailed, StorageError, and CheckpointError for a model that the engine does not run.
    """
    partial = partial_folder(folder, config.storage)
    try:
        models_folder(config.storage).mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (partial / CONFIG).exists():
            with lock_file(folder, config.storage).open("wb") as lock:
                if take_lock(lock):
                    _fill(repository, partial, config, limit_s)
                else:  # a download is under way, and fetches these files first
                    _await(partial / CONFIG, repository, limit_s)
    except OSError as error:
        raise storage_error(partial, error) from error
    try:
        return describe(partial)
    except CheckpointError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{repository.name}: {str(error).replace(f'{partial}: ', '')}") from error


def _fill(repository: Repository, partial: Path, config: EngineConfig, limit_s: float) -> None:
    """Without looking at hashes, which the download does."""
    deadline = time.monotonic() + limit_s
    try:
        with open_client(config.hub_endpoint, config.hub_token) as client:
            client.timeout = httpx.Timeout(limit_s)
            snapshot = list_files(client, config.hub_endpoint, repository)
            partial.mkdir(mode=0o700, exist_ok=True)
            for file in (snapshot.files[path] for path in FILES if path in snapshot.files):
                response = client.get(file.url, timeout=max(0.1, deadline - time.monotonic()))
                require_success(response, repository.name)
                replace_file(partial / file.path, response.content)
    except httpx.RequestError as error:
        raise DownloadFailed(
            f"{config.hub_endpoint} did not answer within {limit_s:g} seconds ({type(error).__name__}); check"
            " hub_endpoint in the form and the network, or copy the model's folder to storage/models by hand"
        ) from error


def _await(file: Path, repository: Repository, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not file.exists():
        if time.monotonic() > deadline:
            raise DownloadFailed(f"{repository.name} is being downloaded, but its {CONFIG} is not here yet; try again")
        time.sleep(_POLL_S)
