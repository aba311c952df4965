"""`bench ladder`: the same requests, 20 % of them repeats, at the same load through three configurations."""

from __future__ import annotations

import argparse

from cli.benches import options
from cli.benches.report import Report
from cli.benches.serve import COLUMNS, Load, Settings, measure_row, report_of
from cli.settings import add_device_settings, settings_from
from cli.traffic import traffic

__all__ = ["COLUMNS", "add_arguments", "measure"]

LADDER: dict[str, Settings] = {
    "fp32, one at a time": {"precision": "fp32", "max_batch_size": "1", "cache_enabled": "false"},
    "fp32, batching": {"precision": "fp32", "cache_enabled": "false"},
    "int8, batching, cache": {"precision": "int8", "cache_enabled": "true"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=int, default=32)
    add_device_settings(parser)
    options.add_traffic(parser)


def measure(arguments: argparse.Namespace) -> Report:
    requests = traffic(arguments.requests or 400, repeats=0.2, size=arguments.image_size, seed=arguments.seed)
    load = Load(arguments.model, requests, traffic(2 * arguments.concurrency, seed=-1), arguments.output_tokens)
    chosen = settings_from(arguments)
    rows = [
        {"row": name, **measure_row(load, chosen | settings, arguments.concurrency)}
        for name, settings in LADDER.items()
    ]
    return report_of(rows, rows)
