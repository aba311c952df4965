"""`bench convert`: a shape's checkpoint of random weights to an artifact, and how long it takes to load it then."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from cli.benches import options
from cli.benches.in_process import ensure_model, storage_folder
from cli.benches.report import BenchError, Report, Row, attempt
from engine.catalog import find_checkpoint

COLUMNS = (
    ("seconds", "seconds"),
    ("peak MiB", "peak_mib"),
    ("bound MiB", "bound_mib"),
    ("artifact MiB", "artifact_mib"),
)
_LOAD = """
import sys, time
from cli.convert import peak_bytes
from engine.config import EngineConfig
from engine.engine import Engine
engine = Engine(EngineConfig.from_mapping({"storage": sys.argv[1], "precision": sys.argv[2], "device": sys.argv[4]}))
started = time.perf_counter()
engine.load(sys.argv[3])
print(time.perf_counter() - started, peak_bytes())
engine.close()
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_shape(parser)
    parser.add_argument("--precision", default="int8", choices=["int8", "fp32"])


def measure(arguments: argparse.Namespace) -> Report:
    """Each row in a process of its own, so that its peak of memory is its own."""
    with storage_folder(arguments) as storage:
        name = ensure_model(arguments.shape, "whole", storage)
        folder = find_checkpoint(name, storage)
        shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
        bound = {"bound_mib": round((1.5 * max(shards) + 2**30) / 2**20)}
        rows = [
            attempt("convert", lambda: _convert(folder, storage, arguments.precision) | bound),
            attempt("open again, verified", lambda: _convert(folder, storage, arguments.precision)),
            attempt("load into an engine", lambda: _load(name, storage, arguments.precision)),
        ]
    return Report(rows, {"checkpoint_mib": sum(shards) >> 20, "shards": len(shards), "largest_mib": max(shards) >> 20})


def _convert(folder: Path, storage: Path, precision: str) -> Row:
    options = ["--precision", precision, "--storage", str(storage), "--json"]
    figures = json.loads(_run("-m", "cli", "convert", str(folder), *options).splitlines()[-1])
    return {
        "seconds": figures["seconds"],
        "peak_mib": figures["peak_bytes"] >> 20,
        "artifact_mib": figures["weight_bytes"] >> 20,
    }


def _load(name: str, storage: Path, precision: str) -> Row:
    """The process's start is not part of it, the first load of ONNX Runtime is."""
    started = time.perf_counter()
    seconds, peak = _run("-c", _LOAD, str(storage), precision, name, "cpu").split()[-2:]
    total = time.perf_counter() - started
    return {"seconds": round(float(seconds), 2), "with_process_s": round(total, 2), "peak_mib": int(peak) >> 20}


def _run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return done.stdout
