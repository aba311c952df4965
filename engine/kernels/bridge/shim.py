"""The one line of C: ONNX Runtime loads operators only from a shared library with the symbol RegisterCustomOps.

It is compiled at first use into a folder of the caller's and found there by the next process. The file's name holds a
checksum of what it was made from and one of itself: a damaged file is not loaded but compiled again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort  # type: ignore[import-untyped]

from engine.errors import KernelsUnavailable

TESTED_VERSIONS = ("1.31.1",)  # of ONNX Runtime: what is asked of its C structs was tried with these
COMPILERS = ("cc", "gcc", "clang")
_SOURCE = (
    "void *(*forward)(void *, const void *); "
    "void *RegisterCustomOps(void *options, const void *api) { return forward ? forward(options, api) : 0; }\n"
)
_FLAGS = ("-shared", "-fPIC", "-O2", "-x", "c", "-")
_CONSEQUENCE = "the stock operators are used, which are slower"
_TIMEOUT = 60.0  # seconds, on a machine that is busy

_compiling = threading.Lock()


def unavailable(folder: Path) -> str | None:
    """Why Python operators cannot be used here, in one sentence; None if they can."""
    if ort.__version__ not in TESTED_VERSIONS:
        return (
            f"the fused kernels were not tested with ONNX Runtime {ort.__version__}: {_CONSEQUENCE}; "
            f"install {' or '.join(TESTED_VERSIONS)} to have them"
        )
    if _find(folder) is None and _compiler() is None:
        return f"the fused kernels need a C compiler and there is none: {_CONSEQUENCE}; install gcc to have them"
    return None


def open_shim(folder: Path) -> tuple[Path, ctypes.CDLL]:
    """The library, compiled into `folder` unless it is there. Raises KernelsUnavailable."""
    if problem := unavailable(folder):
        raise KernelsUnavailable(problem)
    with _compiling:
        path = _find(folder) or _compile(folder)
    try:
        return path, ctypes.CDLL(str(path))
    except OSError as error:  # a folder mounted noexec, say
        raise KernelsUnavailable(
            f"{path} cannot be loaded ({error}): {_CONSEQUENCE}; name a storage folder that allows execution"
        ) from error


def _compiler() -> str | None:
    """CC as Triton understands it, else the first that is installed."""
    return os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)


def _stem() -> str:
    made_from = "\n".join((_SOURCE, *_FLAGS, platform.system(), platform.machine()))
    return f"operators-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}-"


def _find(folder: Path) -> Path | None:
    candidates = sorted(folder.glob(f"{_stem()}*.so"))
    return next((path for path in candidates if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    try:
        return path.stem == _stem() + _checksum(path)
    except OSError:
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(folder: Path) -> Path:
    with _working_file(folder) as work:
        _run_compiler(work)
        with work.open("rb") as stream:
            os.fsync(stream.fileno())
        target = folder / f"{_stem()}{_checksum(work)}.so"
        _publish(work, target)
    return target


def _publish(work: Path, target: Path) -> None:
    """Two processes may do this at once; a file that one of them has just loaded must stay the file of that name."""
    try:
        os.link(work, target)
    except OSError:  # it is there, or the file system has no links
        if not _is_whole(target):
            work.replace(target)


@contextlib.contextmanager
def _working_file(folder: Path) -> Iterator[Path]:
    """A private name in `folder`, gone afterwards."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".operators-", dir=folder) as private:
            yield Path(private) / "library.so"
    except OSError as error:
        raise KernelsUnavailable(
            f"the fused kernels' library cannot be written to {folder} ({error.strerror or error}): {_CONSEQUENCE}"
        ) from error


def _run_compiler(output: Path) -> None:
    compiler = _compiler()
    assert compiler is not None
    try:
        run = subprocess.run(
            [*compiler.split(), *_FLAGS, "-o", str(output)],
            input=_SOURCE, capture_output=True, text=True, timeout=_TIMEOUT, check=False,
        )  # fmt: skip
        problem = run.stderr.strip() if run.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem is not None:
        raise KernelsUnavailable(f"{compiler} could not compile the fused kernels' library: {problem}; {_CONSEQUENCE}")
