"""The engine's settings on the command line, the same in every command that runs models."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import get_args

from engine.config import EngineConfig, KernelFusion, KVPrecision, PrecisionSetting
from engine.errors import InvalidConfig

_FLAGS = ("device", "precision", "gpu_memory", "kv_precision", "kernel_fusion")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """All of them, for a command that works on the user's own storage folder."""
    add_engine_settings(parser)
    parser.add_argument("--storage", type=Path, help="folder for weights and caches")
    parser.add_argument("--no-cache", action="store_true", help="compute everything anew")


def add_engine_settings(parser: argparse.ArgumentParser) -> None:
    """What runs where. The form's default holds for what is left out."""
    parser.add_argument("--precision", choices=get_args(PrecisionSetting))
    add_device_settings(parser)


def add_device_settings(parser: argparse.ArgumentParser) -> None:
    """For a command that chooses the precision itself."""
    parser.add_argument("--device", help="auto, cpu, cuda, or GPUs by number: cuda:0,2")
    parser.add_argument("--gpu-memory", help="share of the free GPU memory (0.85), or MiB (20000)")
    parser.add_argument("--kv-precision", choices=get_args(KVPrecision))
    parser.add_argument("--kernel-fusion", choices=get_args(KernelFusion))
    names = ", ".join(field.name for field in fields(EngineConfig))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=f"any setting: {names}")


def settings_from(args: argparse.Namespace) -> dict[str, str]:
    """The form's values as the command line gave them. Raises InvalidConfig."""
    settings: dict[str, str] = {}
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise InvalidConfig(f"--set {item}: write NAME=VALUE")
        settings[name] = value
    settings |= {name: value for name in _FLAGS if (value := getattr(args, name, None))}
    if storage := getattr(args, "storage", None):
        settings["storage"] = str(storage.expanduser().absolute())
    if getattr(args, "no_cache", False):
        settings["cache_enabled"] = "false"
    EngineConfig.from_mapping(settings)
    return settings
