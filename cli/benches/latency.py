"""What the caches save: answers kept from before a restart, and images that were seen before with new questions.

Each precision gets an empty storage folder. A first plugin process answers every request and is killed; a second one,
on the same folder, is timed: the same requests again, one at a time, then new questions about the same images next to
new questions about new images, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cli.benches import options
from cli.benches.report import Report, Row
from cli.benches.serve import ROOT, memory_of, report_of
from cli.daemon import Daemon
from cli.measured import Measured, ask, distribution, errors
from cli.plugin import plugin
from cli.settings import add_device_settings, settings_from
from cli.traffic import TrafficRequest, traffic

WARM_UP = 3  # requests of their own, which load the model
SETTLE_S = 30.0  # for the last write to reach the disk before the first process is killed


COLUMNS = (
    ("from disk ms", "from_disk_ms.median"),
    ("first s", "first_answer_s"),
    ("new image TTFT", "new_ttft_ms.median"),
    ("seen TTFT", "seen_ttft_ms.median"),
    ("ratio", "ttft_ratio"),
    ("failed", "failed"),
    ("misses", "misses"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_settings(parser)
    options.add_traffic(parser)
    parser.set_defaults(image_size=(1280, 960))


def measure(arguments: argparse.Namespace) -> Report:
    """One row per precision; milliseconds from the request's line on stdin to the line on stdout."""
    count, rows = arguments.requests or 50, list[Row]()
    for precision in ("int8", "fp32"):
        with tempfile.TemporaryDirectory(prefix="tessera-bench-") as storage:
            settings = settings_from(arguments) | {"storage": storage, "precision": precision}
            rows.append({"row": precision, **_measure(arguments, settings, count)})
            rows[-1]["memory"] = memory_of(settings, arguments.model)
    return report_of(rows)


def _measure(arguments: argparse.Namespace, settings: dict[str, str], count: int) -> Row:
    model, seed, size = arguments.model, arguments.seed, arguments.image_size
    parameters = {"max_tokens": arguments.output_tokens, "temperature": 0.0}
    known, new = traffic(count, size=size, seed=seed), traffic(count, size=size, seed=seed + 1)
    with plugin(ROOT, settings) as daemon:
        before = [ask(daemon, model, request.messages(), parameters) for request in known]
        _settle(Path(settings["storage"]), len(known))
    with plugin(ROOT, settings) as daemon:
        first, *_ = [ask(daemon, model, one.messages(), parameters) for one in traffic(WARM_UP, size=size, seed=-1)]
        from_disk = [ask(daemon, model, request.messages(), parameters) for request in known]
        pairs = [_in_turns(daemon, model, *pair, parameters) for pair in zip(new, known, strict=True)]
    unseen, seen = ([one for one in measured if one.error is None] for measured in zip(*pairs, strict=True))
    every = [*before, first, *from_disk, *(one for pair in pairs for one in pair)]
    hits = [one for one in from_disk if one.from_cache]
    new_ttft, seen_ttft = distribution([one.ttft for one in unseen]), distribution([one.ttft for one in seen])
    return {
        **{name: value for name, value in settings.items() if name != "storage"},
        "requests": len(every),
        "failed": sum(one.error is not None for one in every),
        "errors": errors(every),
        "misses": len(from_disk) - len(hits),
        "first_answer_s": round(first.latency, 3),
        "from_disk_ms": distribution([one.latency for one in hits]),
        "new_ttft_ms": new_ttft,
        "seen_ttft_ms": seen_ttft,
        "ttft_ratio": round(new_ttft["median"] / seen_ttft["median"], 2) if new_ttft and seen_ttft else None,
    }


def _in_turns(
    daemon: Daemon, model: str, new: TrafficRequest, known: TrafficRequest, parameters: dict[str, Any]
) -> tuple[Measured, Measured]:
    """A new image, then one that was seen before the restart, both with the same new question."""
    seen = replace(known, question=new.question)
    return (
        ask(daemon, model, new.messages(), parameters),
        ask(daemon, model, seen.messages(), parameters),
    )


def _settle(storage: Path, entries: int) -> None:
    """Wait until both caches hold so many entries: writes are done behind the answers."""
    deadline = time.monotonic() + SETTLE_S
    databases = [storage / "cache" / name / "cache.db" for name in ("answers-v1", "features-v1")]
    while time.monotonic() < deadline and min(map(_entries, databases)) < entries:
        time.sleep(0.05)


def _entries(database: Path) -> int:
    if not database.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=1)) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM Cache").fetchone()[0])
        except sqlite3.OperationalError:  # being made, or written
            return 0
