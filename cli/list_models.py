"""./tessera list: the models that are here, on their way, or could be."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from engine.catalog import BUNDLED, CatalogModel, catalog, known_models, models_folder
from engine.checkpoints import Checkpoint
from engine.config import EngineConfig
from engine.errors import CheckpointError, EngineError
from engine.families import FAMILIES
from engine.hub.download import RECORD
from engine.hub.progress import model_state

HEADINGS = ("NAME", "STATE", "ON DISK", "CONVERTED", "MEMORY INT8", "FROM")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--storage", type=Path, help="storage folder (default: the engine's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Models that are here first, then the predefined ones that can be downloaded."""
    try:
        storage = EngineConfig.from_mapping(
            {"storage": arguments.storage and arguments.storage.expanduser().absolute()}
        ).storage
        rows = [_present(name, folder, storage) for name, folder in sorted(known_models(storage).items())]
        rows += [_absent(model, storage) for model in offered() if model.name not in {row["name"] for row in rows}]
    except (EngineError, OSError) as error:
        print(f"tessera list: {error}", file=sys.stderr)
        return 1
    _print_table([HEADINGS, *map(_cells, rows)])
    if arguments.json:
        print(json.dumps({"storage": str(storage), "models": rows}))
    return 0


def offered() -> list[CatalogModel]:
    """The predefined models whose family the engine runs, in the catalogue's order."""
    families = {family.name for family in FAMILIES}
    return [model for model in catalog().values() if model.family in families]


def artifacts_of(folder: Path, storage: Path) -> list[Path]:
    """The converted forms of a checkpoint. Raises CheckpointError when the checkpoint cannot be read."""
    digest = Checkpoint.open(folder).digest[:24]
    return sorted(path for path in (storage / "artifacts").glob(f"{digest}-*") if path.is_dir())


def size_of(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _present(name: str, folder: Path, storage: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "state": "here", "bytes": size_of(folder), "artifacts": {}, **_facts(name)}
    row["from"] = "this package" if name in BUNDLED else _origin(folder)
    try:
        artifacts = artifacts_of(folder, storage)
        row["artifacts"] = {path.name.split("-")[1]: size_of(path) for path in artifacts if path.suffix != ".partial"}
    except CheckpointError as error:
        row |= {"state": "unusable", "problem": str(error)}
    return row


def _absent(model: CatalogModel, storage: Path) -> dict[str, Any]:
    state = model_state(model.name, storage)
    row = {"name": model.name, "state": state.state, "bytes": 0, "artifacts": {}, "from": model.repository}
    if state.progress is not None:
        row |= {"bytes": state.progress.done, "progress": str(state.progress)}
    return row | _facts(model.name) | {"download_mb": model.download_mb}


def _facts(name: str) -> dict[str, Any]:
    model = catalog().get(name)
    if model is None:
        return {}
    memory = {"memory_int8_mib": model.memory_mib("int8"), "memory_fp16_mib": model.memory_mib("fp16")}
    return {"licence": model.licence, "context": model.context, **memory}


def _origin(folder: Path) -> str:
    """Repository and commit of what was downloaded; what was copied by hand has no record."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        return f"{record['repository']}@{str(record['revision'])[:12]}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"a copy in {models_folder(folder.parent.parent).name}/"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    state = row.get("problem") or row.get("progress") or row["state"]
    if row["state"] == "absent":
        state = f"can be pulled, {row['download_mb'] / 1000:.1f} GB"
    converted = ", ".join(f"{precision} {_gigabytes(size)}" for precision, size in row["artifacts"].items())
    memory = f"{row['memory_int8_mib'] / 1024:.1f} GiB" if "memory_int8_mib" in row else "-"
    return row["name"], state, _gigabytes(row["bytes"]), converted or "-", memory, row["from"]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size else "-"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
