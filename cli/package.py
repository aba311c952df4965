"""Make the .difypkg: a plain zip of what the plugin needs when it runs, the same bytes for the same files."""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

ROOT = Path(__file__).resolve().parent.parent

# pyproject.toml stays out: Dify would prefer its ranges to the pins of requirements.txt.
INCLUDED = (
    "manifest.yaml",
    "main.py",
    "provider",
    "models",
    "engine",
    "demo",
    "_assets",
    "requirements.txt",
    "README.md",
    "readme",
    "PRIVACY.md",
    "LICENSE",
)
SKIPPED_FOLDERS = {"__pycache__"}
# What the marketplace refuses (docs/plugin-submission-requirements.md of langgenius/dify-plugins) or warns about.
REFUSED_SUFFIXES = {
    *(".pyc", ".pyo", ".key", ".pem", ".log", ".tmp"),
    *(".so", ".dll", ".exe", ".pyd", ".dylib", ".bin", ".sh", ".whl", ".zip", ".gz", ".tar"),
}
REFUSED_NAMES = {".git", ".venv", "venv", "env", ".env", ".DS_Store", "build", "dist", "pyproject.toml", "uv.lock"}
MAGIC = {b"\x7fELF": "an ELF binary", b"MZ": "a Windows binary", b"\xcf\xfa\xed\xfe": "a Mach-O binary"}
MAX_BYTES = 50 << 20  # packed, and unpacked
MAX_FILES = 5000
TIMESTAMP = (2026, 1, 1, 0, 0, 0)


class NotPackageable(Exception):
    """The package would be refused; the message names the file and the reason."""


@dataclass(frozen=True, slots=True)
class Package:
    path: Path
    files: int
    packed_bytes: int
    unpacked_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="where to write (default: tessera-<version>.difypkg here)")


def run(args: argparse.Namespace) -> int:
    try:
        package = build(ROOT, args.output or Path(f"{package_name(ROOT)}.difypkg"))
    except (NotPackageable, OSError) as error:
        print(f"tessera: no package was made: {error}", file=sys.stderr)
        return 1
    megabytes = f"{package.packed_bytes / 1e6:.1f} MB packed, {package.unpacked_bytes / 1e6:.1f} MB unpacked"
    print(f"{package.path} ({package.files} files, {megabytes})")
    return 0


def package_name(root: Path) -> str:
    """Name and version from the manifest, as in `tessera-0.1.0`."""
    manifest = yaml.safe_load((root / "manifest.yaml").read_text(encoding="utf-8"))
    return f"{manifest['name']}-{manifest['version']}"


def build(root: Path, target: Path) -> Package:
    """Write the package. Raises NotPackageable, before anything is written, for what Dify would refuse."""
    names = sorted(included_files(root))
    if len(names) > MAX_FILES:
        raise NotPackageable(f"{len(names)} files; at most {MAX_FILES} are allowed")
    contents = {name: (root / name).read_bytes() for name in names}
    for name, data in contents.items():
        _refuse(name, data)
    unpacked = sum(map(len, contents.values()))
    _refuse_size(unpacked, "unpacked")
    partial = target.with_name(target.name + ".partial")
    try:
        _write(partial, contents)
        packed = partial.stat().st_size
        _refuse_size(packed, "packed")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return Package(target, len(names), packed, unpacked)


def included_files(root: Path, included: Sequence[str] = INCLUDED) -> Iterator[str]:
    """Relative paths with forward slashes. Raises NotPackageable for a missing item or a link."""
    for item in included:
        top = root / item
        if not top.exists():
            raise NotPackageable(f"{item} is missing")
        for path in [top] if top.is_file() else top.rglob("*"):
            name = path.relative_to(root)
            if SKIPPED_FOLDERS & set(name.parts):
                continue
            if path.is_symlink():
                raise NotPackageable(f"{name} is a link")
            if path.is_file():
                yield name.as_posix()


def _write(target: Path, contents: dict[str, bytes]) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, TIMESTAMP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)


def _refuse(name: str, data: bytes) -> None:
    path = PurePosixPath(name)
    if path.suffix.lower() in REFUSED_SUFFIXES:
        raise NotPackageable(f"{name}: files ending in {path.suffix} are not allowed")
    if named := REFUSED_NAMES & set(path.parts):
        raise NotPackageable(f"{name}: {named.pop()} is not allowed")
    for magic, kind in MAGIC.items():
        if data.startswith(magic):
            raise NotPackageable(f"{name} is {kind}")


def _refuse_size(size: int, state: str) -> None:
    if size > MAX_BYTES:
        raise NotPackageable(f"{size} bytes {state}; at most {MAX_BYTES} are allowed")
