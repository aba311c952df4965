"""A copy of the plugin whose engine is a fake, as the daemon would find it in its folder."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.daemon import Daemon
from tests.plugin.fake_plugin import copy_with_fake_engine

# Importing dify_plugin patches gevent into everything, which would turn the threads of all other tests into greenlets.
# Its patching module is replaced by an empty one; the plugin's own processes are patched as usual.
sys.modules["dify_plugin._gevent"] = types.ModuleType("dify_plugin._gevent")


@pytest.fixture(scope="session")
def fake_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_with_fake_engine(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="session")
def daemon(fake_plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(fake_plugin, credentials={"storage": str(tmp_path_factory.mktemp("storage"))}) as running:
        yield running
