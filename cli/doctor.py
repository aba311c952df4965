"""What this machine has, and whether the bundled model answers on it."""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cli.ask import ROOT
from cli.daemon import PluginCrashed, PluginError, RequestTimeout
from cli.memory import memory_line, opened_memory
from cli.plugin import plugin
from cli.settings import add_settings, settings_from
from engine.config import EngineConfig
from engine.device import cuda_version, driver_cuda, installed_gpus, resolve
from engine.errors import DeviceUnavailable, EngineError
from engine.storage import open_storage

MODEL = "demo"
PACKAGES = ("dify_plugin", "onnxruntime-gpu", "torch", "transformers", "diskcache", "numpy")
CPU_FEATURES = ("avx2", "f16c", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")  # what int8 gains by

# One white pixel: the smallest PNG that asks the whole way, from the form to the answer.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """A line per fact, or per replica; 1 when something keeps the engine from answering."""
    failed = False
    for name, look in _checks(args):
        try:
            for line in look().splitlines():
                print(f"{name:<12} {line}")
        except (EngineError, PluginError, PluginCrashed, RequestTimeout, ImportError, OSError) as problem:
            failed = True
            print(f"{name:<12} PROBLEM: {problem}")
    return int(failed)


def _checks(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "python", lambda: f"{platform.python_version()} ({sys.executable})"
    yield "packages", _packages
    yield "processor", _processor
    yield "memory", _memory
    yield "onnxruntime", _providers
    yield "gpu", _gpus
    yield "device", lambda: _device(EngineConfig.from_mapping(settings_from(args)))
    yield "storage", lambda: _storage(EngineConfig.from_mapping(settings_from(args)).storage)
    yield "demo", lambda: _demo(settings_from(args))
    yield "model", lambda: "\n".join(map(memory_line, opened_memory(settings_from(args), MODEL)))


def _packages() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def _processor() -> str:
    model, flags = platform.processor() or platform.machine(), ""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() == "flags":
            flags = value
            break
    found = [name for name in CPU_FEATURES if name in flags.split()]
    usable = len(os.sched_getaffinity(0))
    return f"{model}, {usable} cores for this process, {' '.join(found) or 'no vector extensions found'}"


def _memory() -> str:
    sizes = {key: value for key, _, value in (line.partition(":") for line in _lines("/proc/meminfo"))}
    total, free = (int(sizes[key].split()[0]) >> 10 for key in ("MemTotal", "MemAvailable"))
    return f"{free} of {total} MiB available"


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def _providers() -> str:
    import onnxruntime  # type: ignore[import-untyped]

    names = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return f"built for {', '.join(names)}"


def _gpus() -> str:
    """No GPU is a fact, not a problem."""
    try:
        gpus = installed_gpus()
    except DeviceUnavailable as error:
        return f"none: {error}"
    return "; ".join([*map(str, gpus), f"driver {_driver()}"])


def _driver() -> str:
    """Its release and the CUDA it speaks."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    release, speaks = re.search(r"\d+\.\d+(\.\d+)?", text), driver_cuda()
    return f"{release[0] if release else 'of unknown release'} (CUDA {cuda_version(speaks) if speaks else 'unknown'})"


def _device(config: EngineConfig) -> str:
    devices = resolve(config)
    if devices.gpus:
        return f"{config.device}: models run on {', '.join(f'cuda:{gpu.index}' for gpu in devices.gpus)}"
    return f"{config.device}: models run on the CPU" + (f", because {devices.reason}" if devices.reason else "")


def _storage(folder: Path) -> str:
    open_storage(folder)
    return f"{folder}, writable, {shutil.disk_usage(folder).free >> 20} MiB free"


def _demo(credentials: dict[str, str]) -> str:
    image = {
        "type": "image",
        "format": "png",
        "mime_type": "image/png",
        "base64_data": base64.b64encode(PIXEL).decode(),
    }
    question = {"type": "text", "data": "what color is the shape?"}
    started = time.perf_counter()
    with plugin(ROOT, credentials) as daemon:
        ready_s = daemon.wait_until_ready()
        chunks = daemon.invoke_llm([{"role": "user", "content": [image, question]}], {"max_tokens": 8}, model=MODEL)
        answer = "".join(chunk["delta"]["message"]["content"] for chunk in chunks)
    total_s = time.perf_counter() - started
    return f"answers (plugin ready after {ready_s:.1f} s, first answer {answer!r} after {total_s:.1f} s)"
