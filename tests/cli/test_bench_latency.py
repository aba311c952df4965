"""What `./tessera bench latency` reports, on as little traffic as there can be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_last_line_is_json_and_every_known_answer_came_from_the_disk() -> None:
    command = [sys.executable, "-m", "cli", "bench", "latency", "--requests", "2", "--image-size", "320x240", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["precision"] for row in result["rows"]] == ["int8", "fp32"]
    for row in result["rows"]:
        assert (row["requests"], row["failed"], row["misses"]) == (9, 0, 0)
        assert row["from_disk_ms"]["median"] > 0
        assert row["ttft_ratio"] > 0
