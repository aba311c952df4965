"""benchmarks/gpu.sh with an interpreter that only says what it was asked."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from cli import bench, evaluate
from cli.__main__ import COMMANDS
from cli.bench import KINDS

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu.sh"

# `ttft` fails without a word of JSON; the tests' last line is none either
INTERPRETER = """#!/usr/bin/env bash
echo "a card" >&2
echo "a table"
case " $* " in
*" ttft "*) echo "no memory left" >&2; exit 3 ;;
*pytest*) echo '25 passed, "1" skipped' ;;
*) echo "{\\"asked\\": \\"$*\\"}" ;;
esac
"""


def run(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    interpreter = folder / "python"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    command = [str(SCRIPT), "out", *names]
    environment = os.environ | {"PYTHON": str(interpreter), "STORAGE": "/shapes"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_chosen_measurement_leaves_its_json_and_what_it_printed(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "decode-int8-kv")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "decode-int8-kv.json",
        "decode-int8-kv.txt",
        "serve.json",
        "serve.txt",
    ]
    asked = json.loads((out / "serve.json").read_text())["asked"]
    assert asked.startswith("-m cli bench serve --shape qwen2-vl-2b --device cuda --storage /shapes --precision fp16")
    assert asked.endswith("--trace --json")
    assert (out / "serve.txt").read_text() == "a card\na table\n"


def test_one_that_fails_leaves_the_others_and_no_old_result(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ttft.json").write_text("{}")
    done = run(tmp_path, "ttft", "tests")
    assert done.returncode == 1
    assert "failed: ttft" in done.stderr
    assert "no memory left" in (tmp_path / "out" / "ttft.txt").read_text()
    assert not (tmp_path / "out" / "ttft.json").exists()
    assert json.loads((tmp_path / "out" / "tests.json").read_text()) == {"tests": "25 passed, 1 skipped"}


def test_an_unknown_name_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", "sreve")
    assert done.returncode == 2
    assert "there is no sreve; there are: decode-plain" in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_command_line_is_one_that_the_benches_understand(tmp_path: Path) -> None:
    names = subprocess.run([SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout.split()
    assert run(tmp_path, *names).returncode == 1  # ttft, above
    seen = set()
    for file in (tmp_path / "out").glob("*.json"):
        words = json.loads(file.read_text()).get("asked", "").split()
        if words:
            _, _, command, kind, *_ = words
            assert command in COMMANDS
            if command == "bench":
                seen.add(kind)
            _parse(bench if command == "bench" else evaluate, words[3:])
    assert seen == set(KINDS) - {"latency", "ttft", "convert"}  # convert is the CPU's


def _parse(command: ModuleType, words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.add_arguments(parser)
    try:
        parser.parse_args(words)
    except SystemExit:
        pytest.fail(f"not understood: {words}")
