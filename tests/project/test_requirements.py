"""pyproject.toml says what is needed, requirements*.txt what is installed; the two must agree."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!_-]+)")


def pins(*files: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in files:
        for line in (ROOT / file).read_text().splitlines():
            if not line or line.startswith("#"):
                continue
            pin = PIN.fullmatch(line)
            assert pin, f"{file}: {line!r} pins no exact version"
            found[canonicalize_name(pin[1])] = pin[2]
    return found


def needed(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in (extras or {""}))


@pytest.mark.parametrize(
    ("ranges", "files"),
    [
        (PROJECT["project"]["dependencies"], ["requirements.txt"]),
        (PROJECT["dependency-groups"]["dev"], ["requirements.txt", "requirements-dev.txt"]),
    ],
)
def test_every_range_is_met_by_a_pin(ranges: list[str], files: list[str]) -> None:
    pinned = pins(*files)
    for text in ranges:
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned; compile {files[-1]} again"
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


@pytest.mark.parametrize("files", [["requirements.txt"], ["requirements.txt", "requirements-dev.txt"]])
def test_everything_that_a_pinned_package_needs_is_pinned(files: list[str]) -> None:
    pinned = pins(*files)
    for name in pins(files[-1]):
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if needed(requirement, set()):
                assert canonicalize_name(requirement.name) in pinned, f"{name} needs {requirement}"


def test_the_installed_versions_are_the_pinned_ones() -> None:
    for name, version in pins("requirements.txt", "requirements-dev.txt", "requirements-data.txt").items():
        assert importlib.metadata.version(name).split("+")[0] == version, name


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("requirements*.txt")))
def test_no_requirements_file_names_an_index(file: str) -> None:
    assert "://" not in (ROOT / file).read_text()


def test_there_is_no_lock_file() -> None:
    assert not list(ROOT.glob("*.lock"))


def test_what_is_shipped_imports_nothing_that_only_developers_install() -> None:
    installed = pins("requirements.txt")
    owners = importlib.metadata.packages_distributions()
    missing = {
        (name, str(file.relative_to(ROOT)))
        for folder in ("engine", "models", "provider", "cli")
        for file in (ROOT / folder).rglob("*.py")
        for name in _imported(file)
        if not any(canonicalize_name(owner) in installed for owner in owners.get(name, ()))
    }
    assert not missing


def _imported(file: Path) -> set[str]:
    """Top-level names of packages that are neither Python's nor this project's."""
    own = {path.name.removesuffix(".py") for path in ROOT.iterdir()}
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - own - sys.stdlib_module_names
