"""./tessera convert: make a model's artifact ahead of its first use."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import get_args

from cli.progress import ProgressLine
from engine.catalog import find_checkpoint
from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.config import EngineConfig
from engine.device import require_wide
from engine.errors import EngineError
from engine.spec import Precision
from engine.storage import open_storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="a model's name, or a Hugging Face layout folder (config.json, *.safetensors)"
    )
    parser.add_argument("--precision", choices=get_args(Precision), default="int8")
    parser.add_argument("--storage", type=Path, help="storage folder (default: the engine's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when a verified artifact is in place. An interrupted conversion goes on the next time."""
    started = time.perf_counter()
    try:
        storage = arguments.storage and arguments.storage.expanduser().absolute()
        config = EngineConfig.from_mapping({"storage": storage})
        open_storage(config.storage)
        artifact = _converted(_folder(arguments.checkpoint, config), arguments.precision, config.storage)
    except EngineError as error:
        print(f"tessera convert: {error}", file=sys.stderr)
        return 1
    folder = artifact.weights_path.parent
    seconds, peak = time.perf_counter() - started, peak_bytes()
    print(f"{artifact.spec.family}, {arguments.precision}, {artifact.weight_bytes / 2**20:.1f} MiB: {folder}")
    print(f"{seconds:.1f} s, at most {peak / 2**20:.0f} MiB of memory", file=sys.stderr)
    if arguments.json:
        figures = {"weight_bytes": artifact.weight_bytes, "seconds": round(seconds, 2), "peak_bytes": peak}
        print(json.dumps({"artifact": str(folder), "digest": artifact.digest, **figures}))
    return 0


def peak_bytes() -> int:
    """The most memory that this process has held at once (getrusage counts what the parent held at its start)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def _folder(checkpoint: str, config: EngineConfig) -> Path:
    """A folder's path wins over a model's name."""
    return Path(checkpoint) if Path(checkpoint).is_dir() else find_checkpoint(checkpoint, config.storage)


def _converted(folder: Path, precision: Precision, storage: Path) -> Artifact:
    line, started = ProgressLine(), time.monotonic()

    def show(done: int, total: int) -> None:
        left = (time.monotonic() - started) * (total - done) / done
        line.show(f"converting {folder.name}: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {left:.0f} s left")

    try:
        checkpoint = Checkpoint.open(folder)
        if checkpoint.spec.wide_activations:
            require_wide(precision)
        return open_artifact(checkpoint, precision, storage, show)
    finally:
        line.close()
