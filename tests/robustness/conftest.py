"""One plugin process for all tests that do not kill it; other settings are other engines of the same plugin."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.daemon import Daemon
from tests.end_to_end.asking import about, picture, text_of

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "what shape is in the image?"
Works = Callable[[], None]


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("robustness")


@pytest.fixture(scope="session")
def plugin(storage: Path) -> Iterator[Daemon]:
    with Daemon(ROOT, env={"HEARTBEAT_INTERVAL": "0.5"}, credentials={"storage": str(storage)}) as running:
        yield running
        assert running.noise == []
        assert running.killed_for is None


@pytest.fixture
def works(plugin: Daemon) -> Works:
    """Calling it asserts that the next request gets the right answer, computed and not remembered."""
    colors = iter(range(256))

    def ask() -> None:
        image = picture(color=f"#c0{next(colors):02x}20")
        chunks = list(plugin.invoke_llm(about(image, QUESTION), {"temperature": 0.5, "top_k": 1, "max_tokens": 12}))
        assert text_of(chunks).strip() == "circle"

    return ask


@pytest.fixture
def brought(storage: Path) -> Iterator[Callable[[str], Path]]:
    """Copies of the demo's checkpoint under storage/models, as people bring their own."""
    folders: list[Path] = []

    def copy(name: str) -> Path:
        folder = storage / "models" / name
        shutil.copytree(ROOT / "demo", folder)
        folders.append(folder)
        return folder

    yield copy
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
