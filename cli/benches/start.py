"""`bench start`: how long a model takes from a new process to its first token: the first time on a chip, and again.

Converting the checkpoint, which no second start does either, is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cli.benches import options
from cli.benches.in_process import ensure_model, storage_folder
from cli.benches.report import BenchError, Report, Row, attempt
from cli.settings import settings_from
from engine.catalog import find_checkpoint
from engine.checkpoints import Checkpoint, float_inputs, open_artifact
from engine.config import EngineConfig
from engine.device import precision_for, resolve

COLUMNS = (("seconds", "seconds"), ("load s", "load_s"), ("answer s", "answer_s"), ("numerics", "numerics"))
_START = """
import json, sys, time
from cli.benches.in_process import finish, submit
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import SamplingParams
name, settings = sys.argv[1], json.loads(sys.argv[2])
engine = Engine(EngineConfig.from_mapping(settings))
started = time.perf_counter()
model = engine.load(name)
loaded = time.perf_counter()
work = submit(engine, name, "?", SamplingParams(max_tokens=1))
finish([work])
answered = time.perf_counter()
numerics = model.numerics.partition(" ")[2]
print(json.dumps({"load_s": loaded - started, "answer_s": answered - loaded, "numerics": numerics}), flush=True)
engine.close()
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_engine(parser)


def measure(arguments: argparse.Namespace) -> Report:
    """Each start in a process of its own. What earlier ones kept for this chip and model is removed from --storage."""
    from engine.runners.fusion import FOLDER  # imports torch, which the list of benches does without

    with storage_folder(arguments) as storage:
        name = ensure_model(arguments.shape, "whole", storage)
        settings = {**settings_from(arguments), "storage": str(storage), "cache_enabled": "false"}
        converted = attempt("convert", lambda: _convert(name, settings, storage))
        shutil.rmtree(storage / FOLDER, ignore_errors=True)
        rows = [attempt(f"{which} start", lambda: _start(name, settings)) for which in ("first", "next")]
    return Report([converted, *rows])


def _convert(name: str, settings: dict[str, str], storage: Path) -> Row:
    """And forget which of its layers read 16-bit activations, which a first start measures."""
    config, checkpoint = EngineConfig.from_mapping(settings), Checkpoint.open(find_checkpoint(name, storage))
    precision = precision_for(config, resolve(config), checkpoint.spec)
    started = time.perf_counter()
    artifact = open_artifact(checkpoint, precision, storage)
    for file in (float_inputs.FILE, float_inputs.TOWER_FILE):
        (artifact.folder / file).unlink(missing_ok=True)
    return {"seconds": round(time.perf_counter() - started, 2), "artifact_mib": artifact.weight_bytes >> 20}


def _start(name: str, settings: dict[str, str]) -> Row:
    """From the process's start to its first token."""
    started = time.perf_counter()
    command = [sys.executable, "-c", _START, name, json.dumps(settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # what it logs is stderr's
    assert process.stdout is not None
    with process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
        process.stdout.read()
    if process.returncode or not line:
        raise BenchError(f"the process ended with {process.returncode}; its stderr says why")
    told = json.loads(line)
    return {"seconds": round(seconds, 2)} | {
        key: round(value, 2) if isinstance(value, float) else value for key, value in told.items()
    }
