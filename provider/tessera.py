"""Can this machine run us with these settings? Answered in a moment, without starting the engine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dify_plugin import ModelProvider
from dify_plugin.errors.model import CredentialsValidateFailedError

from engine.config import EngineConfig
from engine.device import check_driver
from engine.errors import EngineError, StorageError
from engine.storage import open_storage
from models._settings import engine_config

FREE_SPACE_MIB = 64  # the bundled model's artifact and a few answers


class TesseraProvider(ModelProvider):
    def validate_provider_credentials(self, credentials: Mapping[str, Any]) -> None:
        """Raises CredentialsValidateFailedError with a sentence for the form."""
        try:
            check_settings(engine_config(credentials))
        except EngineError as error:
            raise CredentialsValidateFailedError(str(error)) from error


def check_settings(config: EngineConfig) -> None:
    """Whether the storage folder can be written and has room for a model, and a GPU that is asked for has a driver.

    Raises StorageError or DeviceUnavailable.
    """
    check_driver(config)
    open_storage(config.storage)
    free = free_mib(config.storage)
    if free < FREE_SPACE_MIB:
        raise StorageError(
            f"{config.storage} has {free} MiB free; at least {FREE_SPACE_MIB} MiB are needed: "
            "free some, or name a storage folder on another disk"
        )


def free_mib(folder: Path) -> int:
    """Space left for this user, in MiB."""
    return shutil.disk_usage(folder).free >> 20
