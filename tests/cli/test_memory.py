"""What a model occupies, as the engine tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.memory import opened_memory
from engine.errors import UnknownModel


def test_an_engine_in_its_own_process_tells_what_its_model_occupies(tmp_path: Path) -> None:
    settings = {"storage": str(tmp_path), "device": "cpu", "precision": "int8", "kv_cache_mib": "64"}
    (entry,) = opened_memory(settings, "demo")
    assert (entry["model"], entry["device"], entry["precision"]) == ("demo", "cpu", "int8")
    assert 0 < entry["weights"] < 10 << 20
    assert entry["kv"] == 64 << 20
    assert entry["kv_tokens"] == entry["kv"] // entry["kv_per_token"]
    assert entry["workspace"] == 0
    assert entry["host"] > 10 << 20


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel):
        opened_memory({"storage": str(tmp_path), "device": "cpu"}, "gpt-5")
