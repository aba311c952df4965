"""Benches that start the plugin or its engine's process, on the demo model and a tiny shape, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.__main__ import main
from tests.cli.benches.conftest import MEMORY, Bench


def test_ttft_of_a_shape_goes_through_the_plugin(tiny: Path, bench: Bench) -> None:
    words = ["--shape", "tiny", "--device", "cpu", "--requests", "2", "--output-tokens", "3", "--storage", str(tiny)]
    result = bench("ttft", *words, "--image-size", "96x64")
    new, known = result["rows"]
    assert (new["requests"], new["failed"], known["requests"], known["failed"]) == (2, 0, 2, 0)
    assert new["prompt_tokens"] == known["prompt_tokens"] > 64 + 16
    assert [set(entry) for entry in result["card"]["memory"]] == [MEMORY]


def test_serve_of_a_shape_asks_for_the_tokens_it_was_told_and_compares_two_devices(tiny: Path, bench: Bench) -> None:
    words = ["--shape", "tiny", "--device", "cpu", "--requests", "4", "--concurrency", "2", "--storage", str(tiny)]
    result = bench("serve", *words, "--output-tokens", "5", "--prompt-tokens", "128", "--against", "auto")
    first, last = result["rows"]
    assert (first["row"], last["row"]) == ("2 concurrent, auto", "2 concurrent, cpu")
    for row in (first, last):
        assert (row["requests"], row["failed"], row["output_tokens"]) == (4, 0, 20)
        assert row["input_tokens"] > 4 * 128
    throughput = last["output_token_throughput"] / first["output_token_throughput"]
    assert result["ratios"]["throughput"] == pytest.approx(throughput, abs=0.01)
    assert [entry["row"] for entry in result["card"]["memory"]] == [first["row"], last["row"]]
    assert all(set(entry) == MEMORY | {"row"} for entry in result["card"]["memory"])


def test_a_short_soak_ends_every_stream_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--minutes", "0.06", "--concurrency", "4", "--prompt-tokens", "60"]
    main(["bench", "soak", *words, "--output-tokens", "30", "--json"])  # 1 if memory still fills up in so short a run
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = result["rows"]
    assert [set(entry) for entry in result["card"]["memory"]] == [MEMORY]
    assert row["streams"] > 4
    assert set(row["wrong"]) <= {"host memory grows"}
    assert row["samples"]
