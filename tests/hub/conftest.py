from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from engine.catalog import ROOT
from engine.hub import download, transfer
from tests.hub.stand_in import HubStandIn

NAME = "someone/tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
UNWANTED = {
    "README.md": b"# tiny",
    "pytorch_model.bin": b"\x80\x04pickled",
    "modeling_tiny.py": b"import os",
    "consolidated.safetensors": b"the same again",
    "onnx/model.onnx": b"graph",
    ".gitattributes": b"*.bin lfs",
    "../escape.json": b"{}",
}


def tiny_repository() -> dict[str, bytes]:
    """The demo's configuration and tokenizer with two shards of weights that nobody reads, and what is not needed."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    files = {name: (ROOT / "demo" / name).read_bytes() for name in names}
    files |= {name: save({f"w{i}": np.full(50_000, i, np.float32)}) for i, name in enumerate(SHARDS)}
    weight_map = {f"w{i}": name for i, name in enumerate(SHARDS)}
    return files | {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()} | UNWANTED


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn({NAME: tiny_repository()}) as hub:
        yield hub


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (transfer, download):
        monkeypatch.setattr(module, "PAUSE_S", 0.001)


def demo_repository() -> dict[str, bytes]:
    """A model that answers."""
    return {path.name: path.read_bytes() for path in Path(ROOT / "demo").iterdir() if path.is_file()}
