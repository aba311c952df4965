"""`./tessera bench` in this process, and a shape that is tiny."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.__main__ import main
from cli.benches import checkpoint, shapes

Bench = Callable[..., dict[str, Any]]
MEMORY = {"model", "device", "precision", "weights", "kv", "kv_per_token", "kv_tokens", "workspace", "host"}  # in cards


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run a bench; the JSON object of its last line."""

    def run(*words: str, code: int = 0) -> dict[str, Any]:
        assert main(["bench", *words, "--json"]) == code
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return result

    return run


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A storage folder, and shapes of which one is tiny: SmolVLM with one layer of everything."""
    folder = tmp_path / "shapes"
    shutil.copytree(shapes.FOLDER / "smolvlm-256m", folder / "tiny")
    file = folder / "tiny" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    config["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config["vision_config"] |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 64}
    config["vision_config"] |= {"num_attention_heads": 2}
    file.write_text(json.dumps(config))
    preprocessor = folder / "tiny" / "preprocessor_config.json"
    settings = json.loads(preprocessor.read_text())
    preprocessor.write_text(
        json.dumps(settings | {"max_image_size": {"longest_edge": 64}, "size": {"longest_edge": 128}})
    )
    for module in (shapes, checkpoint):
        monkeypatch.setattr(module, "FOLDER", folder)
    return tmp_path / "storage"
