"""./tessera bench: what the engine reaches, by itself and through Dify's protocol, with generated traffic.

Each kind prints a card, a table and, with --json, one JSON object as the last line. See `./tessera bench KIND --help`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from cli.benches.report import BenchError, Report, print_card, print_table
from cli.machine import card
from engine.errors import EngineError

# kind -> (module, one line of help)
KINDS = {
    "serve": ("cli.benches.serve", "through the plugin: one configuration at several concurrencies"),
    "ladder": (
        "cli.benches.ladder",
        "through the plugin: three configurations on the same traffic, 20 %% of it repeats",
    ),
    "latency": ("cli.benches.latency", "through the plugin: answers and images seen before a restart, one at a time"),
    "ttft": ("cli.benches.ttft", "through the plugin: first token of a new image and of a known one, one at a time"),
    "decode": ("cli.benches.decode", "the engine's step while B sequences decode, against the physical limit"),
    "kernels": (
        "cli.benches.kernels",
        "each fused kernel against what it replaces and its limit; decode steps with one part after the other",
    ),
    "prefill": ("cli.benches.prefill", "the engine's time for new prompts, against the physical limit"),
    "vision": ("cli.benches.vision", "the vision tower, and image files to pixels"),
    "convert": ("cli.benches.conversion", "a checkpoint of random weights to an artifact, and its load"),
    "start": ("cli.benches.start", "a new process to its first token: the first on a chip, which tunes, and the next"),
    "soak": ("cli.benches.soak", "minutes of mixed streams: no memory grows, no stream is lost"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="|".join(KINDS))
    for name, (module, text) in KINDS.items():
        importlib.import_module(module).add_arguments(kinds.add_parser(name, help=text, description=text.capitalize()))


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when every row was measured and every request of it answered."""
    module = importlib.import_module(KINDS[arguments.kind][0])
    try:
        report: Report = module.measure(arguments)
    except (BenchError, EngineError) as error:
        print(f"tessera bench: {error}", file=sys.stderr)
        return 1
    result = {
        "bench": arguments.kind,
        "model": getattr(arguments, "shape", None) or arguments.model,
        "card": card() | report.card,
        "rows": report.rows,
        **report.extra,
    }
    print_card(result["card"])
    print_table(report.rows, module.COLUMNS)
    for name, ratio in report.extra.get("ratios", {}).items():
        print(f"last row against the first: {name} {ratio:.2f}x")
    if arguments.json:
        print(json.dumps(result))
    return 0 if report.is_good else 1
