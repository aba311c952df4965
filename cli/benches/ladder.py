"""`bench ladder`: the same requests, 20 % of them repeats, at the same load through three configurations."""

from __future__ import annotations

import argparse

from cli.benches import options
from cli.benches.report import Report
from cli.benches.serve import COLUMNS, Settings, measure_row, open_load, report_of
from cli.settings import add_device_settings, settings_from
from engine.config import EngineConfig
from engine.device import resolve

__all__ = ["COLUMNS", "add_arguments", "measure"]

REPEATS = 0.2
_ALONE = {"precision": "fp32", "max_batch_size": "1", "cache_enabled": "false"}
ON_CPU: dict[str, Settings] = {
    "fp32, one at a time": _ALONE,
    "fp32, batching": {"precision": "fp32", "cache_enabled": "false"},
    "int8, batching, cache": {"precision": "int8", "cache_enabled": "true"},
}
ON_GPU: dict[str, Settings] = {
    "fp32, one at a time": _ALONE | {"kernel_fusion": "off"},
    "fp16, batching": {"precision": "fp16", "kernel_fusion": "off", "cache_enabled": "false"},
    "int8, batching, kernels, cache": {"precision": "int8", "kernel_fusion": "on", "cache_enabled": "true"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=int, default=32)
    add_device_settings(parser)
    options.add_shaped_traffic(parser)


def measure(arguments: argparse.Namespace) -> Report:
    chosen = settings_from(arguments)
    configurations = ON_GPU if resolve(EngineConfig.from_mapping(chosen)).gpus else ON_CPU
    with open_load(arguments, arguments.concurrency, arguments.requests or 400, REPEATS) as load:
        rows = [
            {"row": name, **measure_row(load, chosen | settings, arguments.concurrency)}
            for name, settings in configurations.items()
        ]
    return report_of(rows, rows)
