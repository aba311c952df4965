"""Where a model that is not here would come from."""

from __future__ import annotations

from engine.catalog import Repository, find_checkpoint, folder_name, models_folder, repository_of
from engine.config import EngineConfig
from engine.errors import UnknownModel


def require_repository(name: str, config: EngineConfig) -> Repository:
    """Where a model that is not there would come from. Raises UnknownModel."""
    repository = repository_of(name)
    if repository is None:
        find_checkpoint(name, config.storage)  # says which names are known
        raise UnknownModel(f"{name!r} is no repository of a hub")
    if config.hub_endpoint == "off":
        raise UnknownModel(
            f"{name} is not under {models_folder(config.storage)}, and downloads are off (hub_endpoint in the form);"
            f" copy its Hugging Face folder there as {folder_name(name)}"
        )
    return repository
