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


def hazards(said: str) -> list[str]:
    """What racecheck found, but for several threads' stores of one instruction to one place: those are the copies of
    one value that Triton keeps in threads where a tensor has fewer values than a program has threads, and writes from
    all of them when another layout reads it.
    """
    pattern = r"Race reported between (\w+) access at (.+)\n=+\s+and (\w+) access at (.+?)(?: \[|$)"
    found = re.findall(pattern, said, flags=re.MULTILINE)
    return [" / ".join(one) for one in found if one[:2] != one[2:] or one[0] != "Write"]


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


def test_copies_of_a_value_are_no_hazard_and_everything_else_is() -> None:
    said = """
========= Error: Race reported between Write access at decode_attention+0x4700 in merge.py:72
=========     and {} [90 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
    assert hazards(said.format("Write access at decode_attention+0x4700 in merge.py:72")) == []
    for other in (
        "Write access at decode_attention+0x4710 in merge.py:72",
        "Read access at decode_attention+0x4700 in x",
    ):
        assert len(hazards(said.format(other))) == 1


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
    if tool == "memcheck":
        assert "SUMMARY: 0 errors" in summary
    else:
        assert int(re.findall(r"\d+", summary)[0]) == said.count("Race reported between"), (
            "all that was found is printed"
        )
        assert not hazards(said)
