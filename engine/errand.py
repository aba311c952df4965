"""Questions that the protocol process must not answer itself, because the answer may hang or needs heavy packages.

A short-lived process answers: `python -m MODULE QUESTION` writes lines of JSON objects, the last one perhaps an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import EngineError, error_from_code

_ROOT = Path(__file__).resolve().parent.parent

Line = dict[str, Any]
Write = Callable[[Line], None]


def ask(
    module: str, question: str, limit_s: float, *, packages: bool = True, command: Sequence[str] | None = None
) -> list[Line]:
    """What the process wrote within `limit_s` seconds. Raises the EngineError that it reports, and a plain one
    when it breaks.

    Without `packages` it has the standard library alone and starts faster. `command` replaces it (tests).
    """
    options = () if packages else ("-S",)
    # Files, because what is in a pipe when the time is over, gevent's `subprocess` drops.
    with tempfile.TemporaryFile() as written, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*(command or (sys.executable, *options, "-m", module)), question],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=said,
        )
        try:
            failed = process.wait(limit_s) != 0
        except subprocess.TimeoutExpired:
            failed = False
            process.kill()  # not waited for: a process that hangs in the kernel ends when the kernel lets it
        written.seek(0)
        said.seek(0)
        lines: list[Line] = [json.loads(line) for line in written if line.endswith(b"\n")]
        if failed:
            last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise EngineError(f"{module} failed with code {process.returncode}: {last or 'it said nothing'}")
    for line in lines:
        if "error" in line:
            raise error_from_code(line["error"], line["message"])
    return lines


def answer(work: Callable[[str, Write], None]) -> None:
    """The process's side: `work` gets the question and what writes a line. For `if __name__ == "__main__"`."""
    try:
        work(sys.argv[1], _write)
    except EngineError as error:
        _write({"error": error.code, "message": str(error)})


def _write(line: Line) -> None:
    print(json.dumps(line), flush=True)
