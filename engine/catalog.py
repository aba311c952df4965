"""Which models there are and where their checkpoints lie. Cheap to import: the protocol process does."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import UnknownModel

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = {"demo": ROOT / "demo"}
MAIN = "main"  # the revision that a repository starts with

_DATA = Path(__file__).with_suffix(".toml")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_REPOSITORY = re.compile(rf"({_PART})/({_PART})(?:@([A-Za-z0-9][A-Za-z0-9._-]{{0,94}}))?")
_BYTES = {"int8": 1.02, "fp16": 2.0}  # a parameter; int8 has a scale for each row
_RUNNING_MIB = 1536  # KV of a few thousand tokens and working memory


@dataclass(frozen=True, slots=True)
class Repository:
    """What a hub calls a checkpoint: `owner/name`, and a branch, tag or commit."""

    name: str
    revision: str = MAIN
    modelscope: str = ""  # the name there, where it is another one

    def on(self, *, modelscope: bool) -> str:
        return self.modelscope if modelscope and self.modelscope else self.name


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A predefined model; the fields are explained in catalog.toml. `name` is Dify's and the folder's."""

    name: str
    label: str
    family: str  # the name of one in engine/families
    repository: str
    licence: str
    parameters: int  # millions
    download_mb: int
    context: int
    revision: str = MAIN
    modelscope: str = ""
    vision: bool = False
    video: bool = False
    thinking: bool = False
    tools: bool = False

    def memory_mib(self, precision: Literal["int8", "fp16"]) -> int:
        """What weights and a few thousand tokens take, rounded up to whole 256 MiB: an estimate to choose a machine."""
        weights = self.parameters * 1e6 * _BYTES[precision] / 2**20
        return -int(-(weights + _RUNNING_MIB) // 256) * 256


@functools.cache
def catalog() -> Mapping[str, CatalogModel]:
    """The predefined models that are downloaded, by name."""
    return {name: CatalogModel(name=name, **fields) for name, fields in tomllib.loads(_DATA.read_text("utf-8")).items()}


def models_folder(storage: Path) -> Path:
    """Checkpoints, downloaded or brought: one Hugging Face layout folder per model name."""
    return storage / "models"


def repository_of(name: str) -> Repository | None:
    """Where a model of that name is downloaded from: a predefined one's repository, or `owner/name[@revision]`."""
    found = _meant(name)
    return Repository(found.repository, found.revision, found.modelscope) if isinstance(found, CatalogModel) else found


def folder_name(name: str) -> str:
    """The folder under storage/models of a model: `owner/name@revision` becomes `owner--name@revision`.

    A repository that the catalogue has goes by the catalogue's name, so that both names mean one download.
    """
    found = _meant(name)
    if not isinstance(found, Repository):
        return name if found is None else found.name
    return found.name.replace("/", "--") + (f"@{found.revision}" if found.revision != MAIN else "")


def model_name(name: str, storage: Path) -> str:
    """One name for a model, whichever of its names is given: its folder's under storage/models."""
    path = Path(name)
    return path.name if path.is_absolute() and path.parent == models_folder(storage) else folder_name(name)


def _meant(name: str) -> CatalogModel | Repository | None:
    """A predefined model, by its own name or its repository's; another repository; or neither."""
    if model := catalog().get(name):
        return model
    match = _REPOSITORY.fullmatch(name)
    if match is None:
        return None
    repository = Repository(f"{match[1]}/{match[2]}", match[3] or MAIN)
    same = (m for m in catalog().values() if (m.repository, m.revision) == (repository.name, repository.revision))
    return next(same, repository)


def known_models(storage: Path) -> dict[str, Path]:
    """Name to checkpoint folder: the bundled models and every folder under storage/models.

    Names that start with a dot are downloads under way.
    """
    folder = models_folder(storage)
    found = (path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
    return {path.name: path for path in found if not path.name.startswith(".")} | BUNDLED


def find_checkpoint(name: str, storage: Path) -> Path:
    """The checkpoint folder of a model that is there. Raises UnknownModel, naming those. Cheap: every request asks.

    `name` is a folder's under storage/models, any folder's absolute path, a predefined model's or
    `owner/name[@revision]`.
    """
    if name in BUNDLED:
        return BUNDLED[name]
    known, wanted = known_models(storage), model_name(name, storage)
    if (path := Path(wanted)).is_absolute() and path.is_dir():
        return path
    if wanted not in known:
        raise UnknownModel(
            f"unknown model {name!r}; known models: {', '.join(sorted(known))}. "
            f"To add one, put its Hugging Face folder under {models_folder(storage)}; a predefined model"
            " (./tessera list) or a repository (owner/name) is downloaded by ./tessera pull or at its first request"
        )
    return known[wanted]
