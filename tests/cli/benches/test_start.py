"""`bench start`, with the bundled model on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.benches import start
from tests.cli.benches.conftest import Bench


def test_a_first_start_forgets_what_an_earlier_one_measured(bench: Bench, tmp_path: Path) -> None:
    kept = tmp_path / "kernels" / "tiles-0.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    found = bench("start", "--device", "cpu", "--precision", "int8", "--storage", str(tmp_path))
    assert not kept.exists()
    converted, *starts = found["rows"]
    assert converted["artifact_mib"] >= 1
    assert [row["row"] for row in starts] == ["first start", "next start"]
    for row in starts:
        assert 0 < row["load_s"] + row["answer_s"] < row["seconds"]
        assert row["numerics"] == "cpu"


def test_a_process_that_ends_early_is_a_row_that_says_so(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "_START", "raise SystemExit(3)")
    found = bench("start", "--device", "cpu", "--storage", str(tmp_path), code=1)
    assert [row["error"] for row in found["rows"][1:]] == [
        "BenchError: the process ended with 3; its stderr says why"
    ] * 2
