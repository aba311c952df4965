"""Which models there are and where their checkpoints lie."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UnknownModel

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = {"demo": ROOT / "demo"}


def models_folder(storage: Path) -> Path:
    """Checkpoints that people bring: one Hugging Face layout folder per model name."""
    return storage / "models"


def known_models(storage: Path) -> dict[str, Path]:
    """Name to checkpoint folder: the bundled models and every folder under storage/models."""
    folder = models_folder(storage)
    brought = {path.name: path for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else {}
    return brought | BUNDLED


def find_checkpoint(name: str, storage: Path) -> Path:
    """The checkpoint folder of a model. Raises UnknownModel, naming the known ones. Cheap: every request asks."""
    if name in BUNDLED:
        return BUNDLED[name]
    known = known_models(storage)
    if name not in known:
        raise UnknownModel(
            f"unknown model {name!r}; known models: {', '.join(sorted(known))}. "
            f"To add one, put its Hugging Face folder under {models_folder(storage)}"
        )
    return known[name]
