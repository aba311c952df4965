"""The converted weights on disk: a folder with artifact.json and weights.bin."""

from __future__ import annotations

import dataclasses
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - importing it makes "bfloat16" a name that numpy knows
import numpy as np
import xxhash
from numpy.typing import NDArray

from engine.errors import ArtifactError
from engine.spec import ModelSpec, Precision

FORMAT_VERSION = 2
MANIFEST = "artifact.json"
WEIGHTS = "weights.bin"
_HASH_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in weights.bin. `xxh3` is the 64-bit checksum of its bytes, hex."""

    name: str
    dtype: str  # numpy's name: float32, float16, bfloat16 or int8
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    xxh3: str


class Artifact:
    """Converted weights of one checkpoint in one precision, memory-mapped and verified.

    An int8 tensor NAME.weight [out, in] has a NAME.scale float32 [out] beside it; norms, biases and positions are then
    float32. In the other precisions every tensor has the one type, so that a device takes the bytes as they are.
    """

    def __init__(
        self, folder: Path, digest: str, spec: ModelSpec, precision: Precision, entries: Sequence[TensorEntry]
    ) -> None:
        self.folder = folder
        self.digest = digest  # hex; names weights and precision
        self.spec = spec
        self.precision = precision
        self.entries = {entry.name: entry for entry in entries}
        self.weight_bytes = sum(entry.nbytes for entry in entries)
        self.weights_path = folder / WEIGHTS
        with self.weights_path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data = np.frombuffer(self._mapping, np.uint8)

    @classmethod
    def load(cls, folder: Path, digest: str, spec: ModelSpec, precision: Precision) -> Artifact:
        """Raises ArtifactError if the folder is absent, incomplete, of another format, or its checksums do not hold."""
        entries = _read_manifest(folder, digest, spec, precision)
        try:
            artifact = cls(folder, digest, spec, precision, entries)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder / WEIGHTS} cannot be mapped: {error}") from error
        artifact._verify()
        return artifact

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view into the mapped file."""
        entry = self.entries[name]
        return self._bytes(entry).view(entry.dtype).reshape(entry.shape)

    def _bytes(self, entry: TensorEntry) -> NDArray[np.uint8]:
        return self._data[entry.offset : entry.offset + entry.nbytes]

    def _verify(self) -> None:
        for entry in self.entries.values():
            data = self._bytes(entry)
            checksum = xxhash.xxh3_64()
            for start in range(0, len(data), _HASH_BLOCK_BYTES):
                checksum.update(data[start : start + _HASH_BLOCK_BYTES])
                self._release(entry.offset + start)
            if len(data) != entry.nbytes or checksum.hexdigest() != entry.xxh3:
                raise ArtifactError(f"{self.weights_path} is damaged: the checksum of {entry.name} does not hold")
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def _release(self, offset: int) -> None:
        """Sessions map what they need themselves; pages read here stay in the system's cache, not in this process."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapping.madvise(
            mmap.MADV_DONTNEED, start, min(_HASH_BLOCK_BYTES + mmap.PAGESIZE, len(self._data) - start)
        )


def write_manifest(file: Path, digest: str, spec: ModelSpec, precision: Precision, entries: list[TensorEntry]) -> None:
    """May raise OSError."""
    header = _header(digest, spec, precision)
    file.write_text(json.dumps(header | {"tensors": [dataclasses.asdict(entry) for entry in entries]}, indent=1))


def _header(digest: str, spec: ModelSpec, precision: Precision) -> dict[str, Any]:
    values = {
        "format": FORMAT_VERSION,
        "digest": digest,
        "precision": precision,
        "spec": dataclasses.asdict(spec),
    }
    # Tuples become lists, as they do in the file that this is compared with.
    normalised: dict[str, Any] = json.loads(json.dumps(values))
    return normalised


def _read_manifest(folder: Path, digest: str, spec: ModelSpec, precision: Precision) -> list[TensorEntry]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        tensors = manifest.pop("tensors")
        entries = [TensorEntry(**tensor | {"shape": tuple(tensor["shape"])}) for tensor in tensors]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file} is missing or malformed: {error}") from error
    if manifest != _header(digest, spec, precision):
        raise ArtifactError(f"{file} describes another checkpoint, precision or format")
    return entries
