"""./tessera pull: fetch a model ahead of its first use."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from cli.progress import ProgressLine
from engine.catalog import find_checkpoint
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.hub.downloads import Downloads
from engine.hub.progress import label
from engine.storage import open_storage

TOKEN = "HF_TOKEN"  # noqa: S105 - the name of the environment variable; a command line is for everybody to read
POLL_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a predefined model (see ./tessera list) or a repository: owner/name[@revision]")
    parser.add_argument("--hub", help="its address (default: https://huggingface.co); a token is read from $HF_TOKEN")
    parser.add_argument("--storage", type=Path, help="storage folder (default: the engine's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when the model is there, whole and checked. What an interrupted pull has fetched is kept."""
    try:
        config = EngineConfig.from_mapping(
            {
                "storage": arguments.storage and arguments.storage.expanduser().absolute(),
                "hub_endpoint": arguments.hub,
                "hub_token": os.environ.get(TOKEN),
            }
        )
        open_storage(config.storage)
        folder = _fetched(arguments.model, config)
    except EngineError as error:
        print(f"tessera pull: {error}", file=sys.stderr)
        return 1
    print(folder)
    if arguments.json:
        print(json.dumps({"model": arguments.model, "folder": str(folder)}))
    return 0


def _fetched(name: str, config: EngineConfig) -> Path:
    logging.getLogger("engine.hub").addHandler(logging.NullHandler())  # what goes wrong is printed once, by us
    downloads, line = Downloads(config), ProgressLine()
    try:
        if downloads.require(name):
            return find_checkpoint(name, config.storage)
        future = downloads.start(name)
        while True:
            try:
                return future.result(POLL_S)
            except TimeoutError:
                line.show(f"downloading {label(name)}: {downloads.progress(name)}")
    finally:
        line.close()
        downloads.close()
