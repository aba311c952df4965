"""A plugin folder like the real one, but for its engine."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def copy_with_fake_engine(folder: Path) -> Path:
    """Copy what the plugin's process needs into `folder`, with fake_client.py in engine/client.py's place."""
    for name in ("main.py", "manifest.yaml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("provider", "models", "engine", "_assets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("fake_client.py"), folder / "engine" / "client.py")
    return folder
