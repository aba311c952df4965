from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime import models


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny smolvlm checkpoint; not to be changed."""
    model = models.randomise(models.smolvlm())
    return models.save(model, tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))
