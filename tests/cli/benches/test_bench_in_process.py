"""Benches of the engine in this process, on the demo model and a tiny shape, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.__main__ import main
from cli.benches import limits
from tests.cli.benches.conftest import MEMORY, Bench
from tests.cuda.fake_device import FakeGpu


def test_decode_reports_steps_of_exactly_the_batch_with_its_limit(bench: Bench) -> None:
    words = ["--device", "cpu", "--batch", "1,3", "--context", "96", "--steps", "12", "--sampling", "mixed"]
    result = bench("decode", *words)
    assert [(row["batch"], row["steps"]) for row in result["rows"]] == [(1, 12), (3, 12)]
    for row in result["rows"]:
        assert abs(row["context"] - 96) <= 4
        assert 0 < row["host_ms"]["median"] < row["step_ms"]["median"]
        assert row["limit_ms"] > 0
        assert row["tokens_per_s"] > 0
    assert result["card"]["precision"] == "int8"
    assert result["card"]["copy_gb_per_s"] > 0
    (memory,) = result["card"]["memory"]
    assert set(memory) == MEMORY


def test_constrained_decoding_is_a_share_of_the_same_batchs_step_without(bench: Bench) -> None:
    words = ["--device", "cpu", "--batch", "1,3", "--context", "96", "--steps", "12", "--sampling", "constrained"]
    rows = bench("decode", *words)["rows"]
    assert [(row["row"], row["steps"]) for row in rows] == [
        ("B=1 greedy", 12),
        ("B=1 constrained", 12),
        ("B=3 greedy", 12),
        ("B=3 constrained", 12),
    ]
    for free, constrained in zip(rows[::2], rows[1::2], strict=True):
        for share, part in (("overhead", "median"), ("overhead_mean", "mean")):
            ratio = constrained["step_ms"][part] / free["step_ms"][part]
            assert constrained[share] == pytest.approx(ratio - 1, abs=1e-3)


def test_constrained_decoding_is_measured_on_a_device(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu()
    monkeypatch.setattr("engine.engine.resolve", fake.devices)
    monkeypatch.setattr("engine.runners.open_cuda.open_cuda", fake.open)
    monkeypatch.setattr("cli.benches.limits.measure_rates", lambda *_: limits.Rates(1e9, None, None))
    words = ["--device", "cuda", "--precision", "fp32", "--batch", "2", "--context", "96", "--steps", "6"]
    free, constrained = bench("decode", *words, "--sampling", "constrained")["rows"]
    assert (free["steps"], constrained["steps"]) == (6, 6)
    assert "overhead" in constrained


def test_with_two_devices_each_of_them_decodes_the_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(count=2)
    monkeypatch.setattr("engine.engine.resolve", fake.devices)
    monkeypatch.setattr("engine.runners.open_cuda.open_cuda", fake.open)
    monkeypatch.setattr("cli.benches.limits.measure_rates", lambda *_: limits.Rates(1e9, None, None))
    words = ["--device", "cuda:0,1", "--precision", "fp32", "--batch", "2", "--context", "96", "--steps", "6"]
    result = bench("decode", *words)
    (row,) = result["rows"]
    assert (row["batch"], row["devices"], row["steps"]) == (2, 2, 12)
    assert row["tokens_per_s"] == pytest.approx(4e3 / row["step_ms"]["median"], rel=0.01)
    assert [entry["device"] for entry in result["card"]["memory"]] == ["cuda:0", "cuda:1"]


def test_prefill_computes_every_token_of_every_prompt_anew(bench: Bench) -> None:
    words = ["--device", "cpu", "--batch", "1,2", "--context", "64,100", "--rounds", "2", "--prefill-chunk", "64"]
    result = bench("prefill", *words)
    assert [(row["batch"], row["tokens"]) for row in result["rows"]] == [(1, 64), (1, 100), (2, 64), (2, 100)]
    assert result["rows"][1]["steps"] == 2
    assert all(row["tokens_per_s"] > 0 for row in result["rows"])


def test_vision_times_the_tower_and_the_preprocessing_at_three_numbers_of_workers(
    bench: Bench,
) -> None:
    words = ["--device", "cpu", "--batch", "1,2", "--rounds", "1", "--images", "4", "--image-size", "160x120"]
    result = bench("vision", *words)
    *towers, one, two, four = result["rows"]
    assert [row["images"] for row in towers] == [1, 2]
    assert [row["workers"] for row in (one, two, four)] == [1, 2, 4]
    assert all(row["images_per_s"] > 0 for row in result["rows"])


def test_pixels_of_a_shape_are_measured_without_its_weights(bench: Bench) -> None:
    words = ["--shape", "qwen2-vl-2b", "--pixels-only", "--images", "3", "--image-size", "224x112"]
    rows = bench("vision", *words)["rows"]
    assert [row["workers"] for row in rows] == [1, 2, 4]
    assert {row["tokens_per_image"] for row in rows} == {8 * 4}


def test_a_shapes_weights_are_written_once_for_all_calls(tiny: Path, bench: Bench) -> None:
    words = ["--shape", "tiny", "--device", "cpu", "--batch", "1", "--context", "80", "--storage", str(tiny)]
    bench("decode", *words, "--steps", "4")
    (file,) = tiny.glob("models/tiny-decoder-plain/*.safetensors")
    written = file.stat().st_mtime_ns
    bench("prefill", *words, "--rounds", "1")
    assert file.stat().st_mtime_ns == written


def test_a_context_that_the_template_fills_is_an_error_of_its_row(bench: Bench) -> None:
    result = bench("prefill", "--device", "cpu", "--batch", "1", "--context", "2,64", "--rounds", "1", code=1)
    assert "chat template alone" in result["rows"][0]["error"]
    assert result["rows"][1]["tokens_per_s"] > 0


def test_an_unknown_shape_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--shape", "gpt-5"]) == 1
    assert "known shapes: demo, qwen2-vl-2b" in capsys.readouterr().err
