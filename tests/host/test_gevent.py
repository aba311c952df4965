from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_client_works_on_greenlets_and_never_blocks_them() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.host.greenlets"],
        capture_output=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    (line,) = done.stdout.splitlines()  # and nothing of what the engine printed
    seen = json.loads(line)
    assert b"noise by puts" in done.stderr
    assert (seen["streams"], seen["large"], seen["cancelled"], seen["killed"]) == (64, True, 300, 33)
    assert seen["afterwards"] == "0 1 2 "
    assert "my last words" in seen["start"]
    assert seen["heavy"] == []
    assert seen["longest_s"] < 5.0, "the heartbeat stopped while the engine worked"
