"""./tessera test: ruff, mypy and pytest, in that order of cost; all run, the first failure decides the exit code."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="also the long form of slow tests")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest after --, for instance -- tests/cache -x")


def run(arguments: argparse.Namespace) -> int:
    """Return 0 when everything passed."""
    selection = "not gpu" if arguments.all else "not gpu and not slow"
    steps = [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["pytest", "-m", selection, "--cov", "--cov-report=term", "--durations=15", *arguments.pytest],
    ]
    failed = 0
    for step in steps:
        print(f"== {' '.join(step)}", file=sys.stderr, flush=True)
        code = subprocess.run([sys.executable, "-m", *step], cwd=ROOT, check=False).returncode
        failed = failed or code
    return failed
