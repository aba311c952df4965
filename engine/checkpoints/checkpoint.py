"""A checkpoint folder in Hugging Face layout: config.json and safetensors files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import ml_dtypes  # noqa: F401 - importing it gives numpy the bfloat16 that safetensors asks for
import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError
from engine.families import CheckpointConfig, Family, Weight, family_for
from engine.families.family import Source
from engine.spec import FloatType, ModelSpec

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES: dict[str, FloatType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Files up to this size name themselves by content, so that a copy is the same checkpoint; larger ones by name, size,
# modification time and header, because reading gigabytes to learn a name is too slow.
_HASH_WHOLE_BYTES = 64 * 2**20
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor is: its file and the name it has there."""

    file: Path
    name: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose files are present and whose tensors have the shapes that the configuration says."""

    folder: Path
    family: Family
    spec: ModelSpec
    digest: str  # hex; JSON files by content, weights as _HASH_WHOLE_BYTES says
    tensors: Mapping[str, Stored]  # by Source.name

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads JSON files and headers, not weights.

        Raises CheckpointError naming the missing or malformed file, or the missing or misshapen tensor.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; give the folder that holds a model's config.json")
        config = read_config(folder)
        try:
            family = family_for(config.model)
            spec = family.spec(config)
            if not spec.tokens.eos and (eos := _tokenizers_eos(folder)):
                config = dataclasses.replace(config, generation={**config.generation, "eos_token_id": eos})
                spec = family.spec(config)
        except CheckpointError as error:  # names the file; the folder is ours to name
            raise CheckpointError(f"{folder}: {error}") from error
        shapes: dict[str, tuple[int, ...]] = {}
        tensors: dict[str, Stored] = {}
        sizes: Counter[FloatType] = Counter()  # elements
        files = _weight_files(folder)
        for file in files:
            for name, (shape, dtype) in _header(file).items():
                source = family.source_name(name)
                tensors[source], shapes[source] = Stored(file, name), shape
                sizes[dtype] += math.prod(shape)
        layers = spec.decoder.layers + (spec.vision.layers if spec.vision else 0)
        if layers > len(shapes):  # said here, because listing the weights of a billion layers takes all memory
            raise CheckpointError(
                f"{folder}: config.json asks for {layers} layers, but the weights have only {len(shapes)} tensors;"
                " the two do not belong together"
            )
        for weight in family.weights(spec):
            _check_shapes(weight, shapes, folder)
        spec = dataclasses.replace(spec, dtype=_dtype(config.model, sizes))
        return cls(folder, family, spec, _digest(config, files), tensors)

    def weights(self) -> tuple[Weight, ...]:
        return self.family.weights(self.spec)

    def blocks(self, weight: Weight) -> Iterator[NDArray[np.float32]]:
        """The weight in blocks of whole rows, fp32, each at most a few tens of MiB (a row of any size is one block).

        Raises CheckpointError for a file that became unreadable.
        """
        columns = weight.shape[1:]
        for source in weight.sources:
            stored = self.tensors[source.name]
            rows = weight.shape[0] if weight.transposed else source.shape[0]
            step = max(1, _BLOCK_BYTES * rows // (4 * int(np.prod(source.shape))))
            try:
                with safe_open(stored.file, framework="np") as file:
                    view = file.get_slice(stored.name)
                    for start in range(0, rows, step):
                        part = slice(start, min(start + step, rows))
                        block = np.asarray(view[:, part]).T if weight.transposed else np.asarray(view[part])
                        yield block.astype(np.float32).reshape(len(block), *columns)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{stored.file} cannot be read: {error}; download it again") from error


def read_config(folder: Path) -> CheckpointConfig:
    """The JSON files of a checkpoint. Raises CheckpointError; only config.json must be there."""
    # transformers 5 nests the image processor in the processor's file, which then comes first, as in
    # engine/preprocess/settings.py: pixels and their norm must be of one file.
    preprocessor = _json(folder / "processor_config.json", required=False).get("image_processor")
    if preprocessor is None:
        preprocessor = _json(folder / "preprocessor_config.json", required=False)
    return CheckpointConfig(
        model=_json(folder / "config.json", required=True),
        generation=_json(folder / "generation_config.json", required=False),
        preprocessor=preprocessor,
    )


def _tokenizers_eos(folder: Path) -> list[int]:
    """The token that ends a text by the tokenizer's files, which count where the configurations name none."""
    named = _json(folder / "tokenizer_config.json", required=False).get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    added = _json(folder / "tokenizer.json", required=False).get("added_tokens")
    listed = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    numbers = (token.get("id") for token in listed if text and token.get("content") == text)
    return [number for number in numbers if isinstance(number, int)]


def _json(file: Path, *, required: bool) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        if required:
            raise CheckpointError(f"{file} is missing; download the checkpoint again") from None
        return {}
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object; download it again")
    return value


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        weight_map = _json(folder / INDEX, required=True).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map; download it again")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{folder / INDEX} names a file outside the checkpoint's folder; download it again")
    else:
        names = [WEIGHTS]
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; download the checkpoint again (only safetensors files are read)")
    return files


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], FloatType]]:
    """Name, shape and type of each tensor; safe_open also checks that the file is as long as its header says."""
    try:
        with safe_open(file, framework="np") as tensors:
            views = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
            shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
            dtypes = {name: view.get_dtype() for name, view in views.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or malformed ({error}); download it again") from error
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise CheckpointError(f"{file}: {name} has type {dtype}; supported are {', '.join(_DTYPES)}")
    return {name: (shape, _DTYPES[dtypes[name]]) for name, shape in shapes.items()}


def _dtype(config: Mapping[str, Any], sizes: Counter[FloatType]) -> FloatType:
    """The type the author names; where config.json is silent, the one that most of the stored numbers have.

    transformers 5 writes `dtype`, before it was `torch_dtype`; some checkpoints have it in text_config only.
    """
    text = config.get("text_config")
    for section in (config, text if isinstance(text, Mapping) else {}):
        for name in ("dtype", "torch_dtype"):
            named = str(section.get(name)).removeprefix("torch.")
            if named in get_args(FloatType):
                return cast(FloatType, named)
    return max(sizes, key=lambda dtype: sizes[dtype], default="float32")


def _check_shapes(weight: Weight, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    for source in weight.sources:
        found = shapes.get(source.name)
        if found is None:
            raise CheckpointError(
                f"{folder} has no tensor {source.name} ({_shape(source)}); the checkpoint is incomplete"
            )
        if found != source.shape:
            raise CheckpointError(
                f"{folder}: tensor {source.name} is {list(found)}, but config.json asks for {_shape(source)};"
                " the two do not belong together"
            )


def _shape(source: Source) -> str:
    return str(list(source.shape))


def _digest(config: CheckpointConfig, files: list[Path]) -> str:
    digest = xxhash.xxh3_128()
    for values in (config.model, config.generation, config.preprocessor):
        digest.update(json.dumps(values, sort_keys=True).encode())
    for file in files:
        digest.update(file.name.encode())
        digest.update(_file_digest(file))
    return digest.hexdigest()


def _file_digest(file: Path) -> bytes:
    try:
        status = file.stat()
        with file.open("rb") as stream:
            if status.st_size <= _HASH_WHOLE_BYTES:
                return xxhash.xxh3_128_digest(stream.read())
            header = stream.read(8 + int.from_bytes(stream.read(8), "little"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    return xxhash.xxh3_128_digest(header + f"{status.st_size} {status.st_mtime_ns}".encode())
