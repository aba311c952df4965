"""A question to a short-lived process: its lines, its errors, its troubles."""

from __future__ import annotations

import sys

import pytest

from engine import errand
from engine.errors import EngineError, StorageError


def running(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def test_the_question_arrives_and_lines_come_back() -> None:
    echo = running("import json, sys; print(json.dumps({'asked': sys.argv[1]})); print('{}')")
    assert errand.ask("m", "what? \u00e9", 30, command=echo) == [{"asked": "what? \u00e9"}, {}]


def test_a_reported_error_is_raised_as_its_class() -> None:
    report = running("""print('{"one": 1}'); print('{"error": "StorageError", "message": "disk full"}')""")
    with pytest.raises(StorageError, match=r"^disk full$"):
        errand.ask("m", "", 30, command=report)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nothing_of_that_name", "code 1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("import os; os._exit(3)", "code 3: it said nothing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "code -11: it said nothing"),
    ],
)
def test_a_process_that_breaks_is_an_error_that_says_how(code: str, reason: str) -> None:
    with pytest.raises(EngineError, match=f"^m failed with {reason}"):
        errand.ask("m", "", 30, command=running(code))


def test_what_was_written_before_the_time_was_over_counts() -> None:
    slow = running("import time; print('{}', flush=True); time.sleep(60)")
    assert errand.ask("m", "", 1, command=slow) == [{}]
