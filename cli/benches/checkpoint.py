"""A checkpoint folder of random weights in a published model's shape.

Linear layers are N(0, 1 / fan_in), norms 1, biases and positions small: variances stay near 1 through any number of
layers, so half precision holds every activation. The last norm is larger, so that logits spread as trained ones do
(a nearly uniform distribution would make every sampling filter keep the whole vocabulary).
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cli.benches.shapes import BUNDLED, FOLDER, Part, shape_config
from cli.benches.tokenizer import tokenizer_file
from engine.catalog import models_folder
from engine.families import CheckpointConfig, Family, family_for
from engine.families.family import Source, Weight
from engine.spec import ModelSpec

DTYPE = torch.bfloat16  # of all shapes as published
SHARD_BYTES = 1 << 30
SMALL = 0.02  # standard deviation of biases and positions
LAST_NORM = 4.0
WRITERS = 4
_COPIED = ("preprocessor_config.json", "chat_template.jinja")


def ensure_checkpoint(shape: str, part: Part, storage: Path) -> str:
    """The model name under which the engine finds the shape in `storage`; written first unless it is there.

    Raises InvalidConfig for an unknown shape and CheckpointError for an architecture that the engine does not run.
    """
    if shape == BUNDLED:
        return BUNDLED
    name = {"whole": shape, "tower": f"{shape}-tower"}.get(part, f"{shape}-decoder-{part}")
    folder = models_folder(storage) / name
    if not folder.exists():
        config = shape_config(shape, part)
        special = json.loads((FOLDER / shape / "special_tokens.json").read_text(encoding="utf-8"))
        extra = {file: (FOLDER / shape / file).read_bytes() for file in _COPIED}
        write_checkpoint(folder, config, special, extra)
    return name


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], special: Mapping[str, int], extra: Mapping[str, bytes] | None = None
) -> None:
    """Write under another name and rename, so that a folder that is there is complete."""
    family = family_for(config)
    spec = family.spec(CheckpointConfig(model=config, generation={}, preprocessor={}))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file, data in (extra or {}).items():
            (partial / file).write_bytes(data)
        _write_json(partial / "config.json", config)
        _write_json(partial / "tokenizer.json", tokenizer_file(spec.decoder.vocab, special))
        names = {number: text for text, number in special.items()}
        tokens = {"eos_token": names[spec.tokens.eos[0]]} if spec.tokens.eos else {}
        _write_json(partial / "tokenizer_config.json", tokens)
        _write_weights(partial, family, spec)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def stored_name(family: Family, source: str) -> str:
    """The spelling in a file that the family, and transformers, read as `source`."""
    old, new = next((old, new) for old, new in family.prefixes if source.startswith(new))
    return old + source.removeprefix(new)


def random_tensor(weight: Weight, source: Source, device: torch.device) -> torch.Tensor:
    """On `device`; the same values each time, whatever else is written."""
    if weight.name.endswith("norm.weight"):
        return torch.full(source.shape, LAST_NORM if weight.name == "norm.weight" else 1.0, dtype=DTYPE, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(source.name.encode()))
    fan_in = torch.Size(source.shape[1:]).numel()
    scale = SMALL if weight.kind == "plain" else fan_in**-0.5
    return torch.randn(source.shape, generator=generator, dtype=DTYPE, device=device).mul_(scale)


def _write_weights(folder: Path, family: Family, spec: ModelSpec) -> None:
    """Several files at a time; gigabytes take seconds where a GPU draws the numbers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = list(_shards(family.weights(spec)))
    files = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]

    def write(file: str, shard: Iterable[tuple[Weight, Source]]) -> dict[str, str]:
        tensors = {stored_name(family, source.name): random_tensor(weight, source, device).cpu()
                   for weight, source in shard}  # fmt: skip
        save_file(tensors, folder / file, metadata={"format": "pt"})
        return dict.fromkeys(tensors, file)

    with ThreadPoolExecutor(WRITERS) as writers:
        places = [place for written in writers.map(write, files, shards) for place in written.items()]
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": dict(places)})
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _shards(weights: Iterable[Weight]) -> Iterator[list[tuple[Weight, Source]]]:
    shard: list[tuple[Weight, Source]] = []
    size = 0
    for weight in weights:
        for source in weight.sources:
            size += torch.Size(source.shape).numel() * DTYPE.itemsize
            if shard and size > SHARD_BYTES:
                yield shard
                shard, size = [], torch.Size(source.shape).numel() * DTYPE.itemsize
            shard.append((weight, source))
    yield shard


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=None if file.name == "tokenizer.json" else 1))
