"""Each kernel once: interpreted, so that the list stays one of all kernels; on a GPU, watched by compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "engine" / "kernels"
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
COMMAND = [sys.executable, "-m", "tests.kernels.each_once"]


def run(*before: str, **environment: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    command = [*before, *COMMAND]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def kernels() -> set[str]:
    """Functions that a grid is launched of: those whose programs ask which one they are."""
    found = set()
    for file in KERNELS.rglob("*.py"):
        for body in re.split(r"^@triton\.jit", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            name = re.search(r"^def (\w+)", body, flags=re.MULTILINE)
            if name and "tl.program_id" in body.split("\ndef ", 2)[1]:
                found.add(name.group(1))
    return found


def test_the_list_has_every_kernel() -> None:
    said = set(re.findall(r"\w+", run(TRITON_INTERPRET="1")))
    assert len(kernels()) >= 8
    assert kernels() <= said


@cache
def compiled() -> None:
    """All of them, once: what the sanitizer watches is then their launches."""
    print(f"{len(run().splitlines())} launches")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, of the CUDA toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_sanitizer_finds_nothing(tool: str) -> None:
    compiled()
    assert SANITIZER is not None
    said = run(SANITIZER, "--tool", tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    (summary,) = (line for line in said.splitlines() if "SUMMARY" in line)
    print(tool, summary)
    assert re.search(r"SUMMARY: 0 (errors|hazards)", summary)
