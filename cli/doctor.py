"""What this machine has, what the settings come to on it, and whether the bundled model answers."""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cli import checks
from cli.ask import ROOT
from cli.checks import Finding, Unfit
from cli.daemon import PluginCrashed, PluginError, RequestTimeout
from cli.memory import memory_line, opened_memory
from cli.plugin import plugin
from cli.settings import add_settings, settings_from
from engine.config import EngineConfig
from engine.device import Devices, cuda_version, driver_cuda, installed_gpus, resolve
from engine.errors import DeviceUnavailable, EngineError

MODEL = "demo"
CPU_FEATURES = ("avx2", "f16c", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")  # what int8 gains by

# One white pixel: the smallest PNG that asks the whole way, from the form to the answer.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC")

Look = Callable[[], str | Iterable[Finding | str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """A line per fact, or per replica; 1 when something keeps the engine from answering."""
    findings = []
    with _no_warnings():
        for finding in _findings(args):
            findings.append(finding)
            if not args.json:
                print(f"{finding.name:<12} {'' if finding.ok else 'PROBLEM: '}{finding.text}", flush=True)
    ok = all(finding.ok for finding in findings)
    if args.json:
        print(json.dumps({"ok": ok, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
    return int(not ok)


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """What would be warned of is a line here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    for name, look in _checks(args):
        try:
            found = look()
            for one in found.splitlines() if isinstance(found, str) else found:
                yield one if isinstance(one, Finding) else Finding(name, one)
        except (EngineError, PluginError, PluginCrashed, RequestTimeout, Unfit, ImportError, OSError) as problem:
            yield Finding(name, str(problem), ok=False)


def _checks(args: argparse.Namespace) -> Iterator[tuple[str, Look]]:
    yield "python", checks.python
    yield "packages", checks.packages
    yield "processor", _processor
    yield "memory", _memory
    yield "onnxruntime", _providers
    yield "gpu", _gpus
    yield "libraries", checks.libraries
    try:
        settings = settings_from(args)
        config = EngineConfig.from_mapping(settings)
    except EngineError as problem:  # nothing else can be said about settings that are none
        yield "settings", _raise(problem)
        return
    yield "device", lambda: _device(config)
    devices = _resolved(config)
    yield "precision", lambda: checks.precision(config, devices)
    yield "compiler", lambda: checks.compiler(config, devices)
    yield "storage", lambda: checks.storage(config.storage)
    yield "models", lambda: checks.models(config, devices)
    yield "port", lambda: checks.port(config)
    yield "demo", lambda: _demo(settings)
    yield "model", lambda: "\n".join(map(memory_line, opened_memory(settings, MODEL)))


def _raise(problem: EngineError) -> Look:
    def look() -> str:
        raise problem

    return look


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


def _resolved(config: EngineConfig) -> Devices:
    """For what depends on it; where it cannot be had, `_device` has said so and the CPU stands in."""
    try:
        return resolve(config)
    except EngineError:
        return Devices()


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
