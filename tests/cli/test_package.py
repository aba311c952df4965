"""The package holds what the plugin needs, nothing that Dify refuses, and runs from where it is unpacked."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import pytest

from cli import package
from cli.daemon import Daemon
from cli.package import NotPackageable, Package

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package.build(ROOT, tmp_path_factory.mktemp("package") / "tessera.difypkg")


def small_plugin(root: Path) -> Path:
    """Every included item, as small as it can be."""
    for item in package.INCLUDED:
        if "." in item or item == "LICENSE":
            (root / item).write_text(item)
        else:
            (root / item).mkdir()
            (root / item / "file.txt").write_text(item)
    (root / "manifest.yaml").write_text("name: tessera\nversion: 1.2.3\n")
    return root


def test_the_package_stays_within_difys_limits(built: Package) -> None:
    assert built.path.stat().st_size == built.packed_bytes <= 50 << 20
    assert built.unpacked_bytes <= 50 << 20
    assert built.files <= 5000


def test_the_package_holds_only_what_is_on_the_list(built: Package) -> None:
    names = zipfile.ZipFile(built.path).namelist()
    assert {name.partition("/")[0] for name in names} == set(package.INCLUDED)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert "pyproject.toml" not in names


def test_the_same_files_make_the_same_bytes(built: Package, tmp_path: Path) -> None:
    again = package.build(ROOT, tmp_path / "again.difypkg")
    assert again.path.read_bytes() == built.path.read_bytes()


def test_the_plugin_runs_from_where_it_is_unpacked(built: Package, tmp_path: Path) -> None:
    zipfile.ZipFile(built.path).extractall(tmp_path / "plugin")
    with Daemon(tmp_path / "plugin") as daemon:
        assert daemon.manifest["name"] == "tessera"
        assert daemon.schema()["model_schema"]["model"] == "demo"
        assert daemon.validate_provider({"storage": str(tmp_path / "storage")})["result"] is True
        assert not daemon.noise


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("engine/kernel.so", b"", "files ending in .so"),
        ("engine/tool", b"\x7fELF\x02", "an ELF binary"),
        ("engine/tool.dat", b"MZ\x90", "a Windows binary"),
        ("models/secret.pem", b"", "files ending in .pem"),
        ("engine/build/x.py", b"", "build is not allowed"),
        ("demo/.DS_Store", b"", ".DS_Store is not allowed"),
    ],
)
def test_what_dify_refuses_is_refused_here_and_nothing_is_written(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    root = small_plugin(tmp_path)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(data)
    with pytest.raises(NotPackageable, match=reason):
        package.build(root, tmp_path / "out.difypkg")
    assert not list(tmp_path.glob("out*"))


def test_a_link_is_refused(tmp_path: Path) -> None:
    root = small_plugin(tmp_path)
    (root / "engine" / "link").symlink_to("/etc/passwd")
    with pytest.raises(NotPackageable, match="engine/link is a link"):
        package.build(root, tmp_path / "out.difypkg")


def test_a_missing_item_is_named(tmp_path: Path) -> None:
    root = small_plugin(tmp_path)
    (root / "PRIVACY.md").unlink()
    with pytest.raises(NotPackageable, match=r"PRIVACY\.md is missing"):
        package.build(root, tmp_path / "out.difypkg")


def test_a_package_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_BYTES", 100)
    with pytest.raises(NotPackageable, match="unpacked; at most 100"):
        package.build(small_plugin(tmp_path), tmp_path / "out.difypkg")


def test_caches_are_left_out(tmp_path: Path) -> None:
    root = small_plugin(tmp_path)
    (root / "engine" / "__pycache__").mkdir()
    (root / "engine" / "__pycache__" / "x.pyc").write_bytes(b"")
    assert package.build(root, tmp_path / "out.difypkg").files == len(package.INCLUDED)


def test_the_file_is_named_after_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(package, "ROOT", small_plugin(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert package.run(argparse.Namespace(output=None)) == 0
    assert (tmp_path / "tessera-1.2.3.difypkg").is_file()
    assert "12 files" in capsys.readouterr().out
