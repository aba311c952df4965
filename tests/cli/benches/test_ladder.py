"""`bench ladder`: which configurations it compares where, and what it makes of their rows."""

from __future__ import annotations

import pytest

from cli.benches import ladder
from cli.benches.report import Row
from cli.benches.serve import Load, Settings
from tests.cli.benches.conftest import Bench
from tests.cuda.fake_device import FakeGpu


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Load, Settings]]:
    """What was sent to which configuration; the third answers twice as fast as the second and that as the first."""
    seen = list[tuple[Load, Settings]]()

    def measure_row(load: Load, settings: Settings, concurrency: int) -> Row:
        seen.append((load, settings))
        times = 2 ** (len(seen) - 1)
        return {
            "concurrency": concurrency,
            "requests": len(load.requests),
            "output_token_throughput": 100.0 * times,
            "latency_ms": {"mean": 800.0 / times},
            "weight_bytes": {"fp32": 4000, "fp16": 2000, "int8": 1000}[settings["precision"]],
            "memory": [],
        }

    monkeypatch.setattr(ladder, "measure_row", measure_row)
    return seen


def test_on_a_gpu_the_last_configuration_has_int8_our_kernels_and_the_cache(
    bench: Bench, measured: list[tuple[Load, Settings]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "resolve", FakeGpu().devices)
    result = bench("ladder", "--device", "cuda", "--requests", "10")
    first, second, last = (settings for _, settings in measured)
    assert (first["precision"], first["max_batch_size"], first["cache_enabled"]) == ("fp32", "1", "false")
    assert (second["precision"], second["kernel_fusion"], second["cache_enabled"]) == ("fp16", "off", "false")
    assert (last["precision"], last["kernel_fusion"], last["cache_enabled"]) == ("int8", "on", "true")
    assert all(settings["device"] == "cuda" for _, settings in measured)
    assert "max_batch_size" not in second | last
    assert result["ratios"] == {"throughput": 4.0, "mean_latency": 4.0, "weight_bytes": 4.0}


def test_on_a_cpu_16_bits_are_not_tried_and_every_configuration_gets_the_same_repeats(
    bench: Bench, measured: list[tuple[Load, Settings]]
) -> None:
    bench("ladder", "--device", "cpu", "--requests", "10")
    assert [settings["precision"] for _, settings in measured] == ["fp32", "fp32", "int8"]
    assert not any("kernel_fusion" in settings for _, settings in measured)
    sent = [[request.image for request in load.requests] for load, _ in measured]
    assert sent[0] == sent[1] == sent[2]
    assert (len(sent[0]), len(set(sent[0]))) == (10, 8)
