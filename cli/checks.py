"""What `./tessera doctor` looks at that needs no engine: packages, compiler, libraries, storage, models, the port.

A check returns what is fine as lines of text and findings for what is not, or raises what it died of.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli.top import NoEngine, scrape
from engine.catalog import BUNDLED, known_models, models_folder
from engine.check import COMPILERS, FREE_SPACE_MIB
from engine.config import EngineConfig
from engine.device import LIBRARIES, Devices, driver_cuda, machine_probe, precision_for, resolve_precision
from engine.errors import DeviceUnavailable, EngineError, KernelsUnavailable
from engine.metrics import HOST
from engine.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (3, 12)
PACKAGES = ("dify_plugin", "onnxruntime-gpu", "torch", "transformers", "diskcache", "numpy")
_MIB = 2**20


class Unfit(Exception):
    """Something that this machine lacks; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and whether that keeps anything from working."""

    name: str
    text: str
    ok: bool = True


def python() -> str:
    if sys.version_info[:2] != PYTHON:
        raise Unfit(f"this is Python {platform.python_version()}; Dify's plugins need {'.'.join(map(str, PYTHON))}")
    return f"{platform.python_version()} ({sys.executable})"


def packages(requirements: Path = ROOT / "requirements.txt") -> str:
    """Versions, and those that are not the tested ones. Raises Unfit when one is missing."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    found = {name: _version(name) for name in PACKAGES}
    if missing := [name for name, version in found.items() if version is None]:
        raise Unfit(f"{', '.join(missing)} not installed: pip install -r {requirements}")
    return ", ".join(
        f"{name} {version}{_note(version, tested.get(_canonical(name)))}" for name, version in found.items()
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _note(version: str | None, tested: str | None) -> str:
    return "" if tested is None or version is None or version.split("+")[0] == tested else f" (tested with {tested})"


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def libraries() -> str:
    """What ONNX Runtime's CUDA provider is linked with. Raises Unfit or DeviceUnavailable."""
    if driver_cuda() is None:
        return "CUDA's are not looked for, because there is no NVIDIA driver"
    try:
        missing = machine_probe().missing(list(LIBRARIES))
    except (ImportError, OSError) as error:
        raise DeviceUnavailable(f"torch or ONNX Runtime cannot be imported ({error})") from error
    if missing:
        wanted = sorted({LIBRARIES[library] for library in missing})
        raise Unfit(f"{', '.join(missing)} cannot be loaded: pip install {' '.join(wanted)}")
    return f"{', '.join(LIBRARIES)} found"


def compiler(config: EngineConfig, devices: Devices) -> str:
    """Raises KernelsUnavailable when the settings insist on what needs one."""
    found = os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if found:
        return found
    what = "no C compiler: install one, for example with apt install gcc"
    if devices.gpus and config.kernel_fusion == "on":
        raise KernelsUnavailable(f"{what}, or set kernel_fusion to auto")
    return f"{what}; the fused kernels of a GPU need it, a CPU does not"


def precision(config: EngineConfig, devices: Devices) -> str:
    """What the setting comes to. Raises InvalidConfig for one that the devices do not have."""
    chosen = [resolve_precision(config, devices, dtype) for dtype in ("float16", "bfloat16")]
    return f"{config.precision}: weights are kept as {' or '.join(dict.fromkeys(chosen))}" + (
        ", as the checkpoint has them" if len(set(chosen)) > 1 else ""
    )


def storage(folder: Path) -> list[Finding | str]:
    """Raises StorageError."""
    open_storage(folder)
    usage = shutil.disk_usage(folder)
    free = usage.free // _MIB
    lines: list[Finding | str] = [f"{folder}, writable, {free:,} of {usage.total // _MIB:,} MiB free"]
    if free < FREE_SPACE_MIB:
        text = f"{free:,} MiB are too few, even for the bundled model: free some, or name a folder on another disk"
        lines.append(Finding("storage", text, ok=False))
    kept = {name: size_of(folder / name) for name in ("models", "artifacts", "cache", "kernels")}
    lines.append("holds " + ", ".join(f"{name} {size / _MIB:,.0f} MiB" for name, size in kept.items()))
    return lines


def models(config: EngineConfig, devices: Devices) -> Iterator[Finding | str]:
    """A line for each: family, size, precision here; a folder that is none of ours says why."""
    from engine.checkpoints import Checkpoint  # reads headers, for which numpy and more are imported

    for name, folder in sorted(known_models(config.storage).items()):
        try:
            spec = Checkpoint.open(folder).spec
            kept = precision_for(config, devices, spec)
        except (EngineError, OSError) as problem:
            yield Finding("models", f"{name}: {problem}", ok=False)
            continue
        yield f"{name}: {spec.family}, {size_of(folder) / _MIB:,.0f} MiB, runs in {kept}"
    if known_models(config.storage).keys() == BUNDLED.keys():
        yield f"no other in {models_folder(config.storage)}"


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, those that links lead to included; 0 for one that is not there."""
    total = 0
    for place, _, files in folder.walk():
        for name in files:
            try:
                status = (place / name).stat()
            except OSError:  # it went away, or the link leads nowhere
                continue
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def port(config: EngineConfig) -> str:
    """Raises Unfit when something that is no engine has the metrics port."""
    number = config.metrics_port
    if not number:
        return "no metrics (metrics_port is 0)"
    try:
        with socket.socket() as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server: a closed one's last word is no use
            probe.bind((HOST, number))
        return f"{number} is free for metrics"
    except PermissionError:
        raise Unfit(f"port {number} is not for this user: set metrics_port to one above 1023") from None
    except OSError as problem:
        try:
            scrape(number)
        except NoEngine:
            raise Unfit(
                f"port {number} of {HOST} is taken ({problem.strerror}): metrics_port names another one"
            ) from None
    return f"{number} is served by a running engine (./tessera top --port {number})"
