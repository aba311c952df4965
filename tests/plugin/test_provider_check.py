"""What the form's check says about a storage folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine import device
from engine.config import EngineConfig
from engine.errors import DeviceUnavailable, StorageError
from provider import tessera


def test_a_disk_with_too_little_room_is_named_with_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tessera, "free_mib", lambda folder: 3)
    with pytest.raises(StorageError, match="3 MiB free; at least 64 MiB"):
        tessera.check_settings(EngineConfig(storage=tmp_path))


def test_a_gpu_without_a_driver_is_refused_when_the_form_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "DRIVER", "libnothing.so.1")
    tessera.check_settings(EngineConfig(storage=tmp_path))
    with pytest.raises(DeviceUnavailable, match="CUDA was asked for, but there is no NVIDIA driver"):
        tessera.check_settings(EngineConfig(storage=tmp_path, device="cuda:1"))


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "storage"
    path.write_text("not a folder")
    with pytest.raises(StorageError, match=str(path)):
        tessera.check_settings(EngineConfig(storage=path))


def test_free_space_is_that_of_the_folders_disk(tmp_path: Path) -> None:
    assert abs(tessera.free_mib(tmp_path) - (shutil.disk_usage(tmp_path).free >> 20)) < 1024
