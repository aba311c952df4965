"""A copy of the plugin whose engine is a fake, as the daemon would find it in its folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.daemon import Daemon

ROOT = Path(__file__).resolve().parents[2]


def copy_plugin(target: Path, client: Path) -> Path:
    for name in ("main.py", "manifest.yaml"):
        shutil.copy(ROOT / name, target / name)
    for name in ("provider", "models", "engine", "_assets"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(client, target / "engine" / "client.py")
    return target


@pytest.fixture(scope="session")
def fake_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_plugin(tmp_path_factory.mktemp("plugin"), Path(__file__).with_name("fake_client.py"))


@pytest.fixture(scope="session")
def daemon(fake_plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(fake_plugin, credentials={"storage": str(tmp_path_factory.mktemp("storage"))}) as running:
        yield running
