"""./tessera convert: make a checkpoint folder's artifact ahead of its first use."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from engine.checkpoints import Checkpoint, open_artifact
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.spec import Precision
from engine.storage import open_storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face layout folder (config.json, *.safetensors)")
    parser.add_argument("--precision", choices=get_args(Precision), default="int8")
    parser.add_argument("--storage", type=Path, help="storage folder (default: the engine's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when a verified artifact is in place."""
    try:
        config = EngineConfig.from_mapping({"storage": arguments.storage and arguments.storage.resolve()})
        open_storage(config.storage)
        artifact = open_artifact(Checkpoint.open(arguments.checkpoint), arguments.precision, config.storage)
    except EngineError as error:
        print(f"tessera convert: {error}", file=sys.stderr)
        return 1
    folder = artifact.weights_path.parent
    print(f"{artifact.spec.family}, {arguments.precision}, {artifact.weight_bytes / 2**20:.1f} MiB: {folder}")
    if arguments.json:
        print(json.dumps({"artifact": str(folder), "digest": artifact.digest, "weight_bytes": artifact.weight_bytes}))
    return 0
