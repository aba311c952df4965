"""From a checkpoint to an artifact: streamed, atomic, once for all processes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from engine.checkpoints.artifact import FORMAT_VERSION, MANIFEST, WEIGHTS, Artifact, TensorEntry, write_manifest
from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.journal import Journal
from engine.checkpoints.quantise import quantise_rows
from engine.errors import ArtifactError, CheckpointError
from engine.families import Weight
from engine.files import sync, take_lock
from engine.spec import FloatType, Precision
from engine.storage import storage_error

logger = logging.getLogger(__name__)

# The type of everything that is not quantised.
_DTYPES: dict[Precision, FloatType] = {"int8": "float32", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_WIDER: dict[FloatType, str] = {"float16": "bf16 or int8", "bfloat16": "int8 or fp32"}
ALIGNMENT = 64  # bytes: a cache line, and more than any kernel asks for
LOG_EVERY_S = 10.0
_PARTIAL, _LOCK, _JOURNAL = ".partial", ".lock", "journal"

OnProgress = Callable[[int, int], None]
"""Called after each weight with the artifact's bytes so far and in all."""


def open_artifact(
    checkpoint: Checkpoint, precision: Precision, storage: Path, on_progress: OnProgress | None = None
) -> Artifact:
    """The artifact of this checkpoint and precision, converted first unless a good one is in `storage`.

    A damaged artifact is removed and converted again. A second process waits for the first one's conversion instead
    of repeating it, and a conversion that was killed goes on with the weight it was at. It takes memory for the
    largest tensor of the checkpoint and a few blocks. Raises StorageError when the folder cannot be written,
    CheckpointError when a file of the checkpoint cannot be read, or one of its values is not finite or beyond the
    range of the precision's type.
    """
    folder = storage / "artifacts" / f"{checkpoint.digest[:24]}-{precision}-v{FORMAT_VERSION}"
    digest = xxhash.xxh3_128_hexdigest(f"{checkpoint.digest} {precision} {FORMAT_VERSION}".encode())
    with contextlib.suppress(ArtifactError):
        return Artifact.load(folder, digest, checkpoint.spec, precision)
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder):
            with contextlib.suppress(ArtifactError):  # another process converted it while this one waited
                return Artifact.load(folder, digest, checkpoint.spec, precision)
            _convert(checkpoint, precision, folder, digest, on_progress)
    except OSError as error:
        raise storage_error(folder, error) from error
    return Artifact.load(folder, digest, checkpoint.spec, precision)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the artifact's lock file; the system releases it when a process dies, however it dies."""
    with folder.with_name(f"{folder.name}{_LOCK}").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(
    checkpoint: Checkpoint, precision: Precision, folder: Path, digest: str, on_progress: OnProgress | None
) -> None:
    """Write under a temporary name, flush, rename. The caller holds the lock, so this name's leftovers are dead."""
    partial = folder.with_name(f"{folder.name}{_PARTIAL}")
    _sweep(folder.parent)
    if folder.exists():
        shutil.rmtree(folder)
    partial.mkdir(mode=0o700, exist_ok=True)
    try:
        entries = _write_weights(checkpoint, precision, partial, digest, on_progress or _log_progress(checkpoint))
        (partial / _JOURNAL).unlink()
        write_manifest(partial / MANIFEST, digest, checkpoint.spec, precision, entries)
        for path in (partial / MANIFEST, partial):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    except Exception:  # what fails would fail again; an interrupted conversion can go on
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sweep(artifacts: Path) -> None:
    """Remove what killed conversions of other artifacts left; a lock that can be taken has no living owner."""
    for partial in artifacts.glob(f"*{_PARTIAL}"):
        with partial.with_name(partial.name.removesuffix(_PARTIAL) + _LOCK).open("wb") as lock:
            if take_lock(lock):
                shutil.rmtree(partial, ignore_errors=True)


def _log_progress(checkpoint: Checkpoint) -> OnProgress:
    """A line every ten seconds, for whoever wonders why a first load takes long."""
    told_at = time.monotonic()

    def log(done: int, total: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= LOG_EVERY_S:
            told_at = time.monotonic()
            logger.info("converting %s: %d of %d MB", checkpoint.folder.name, done / 1e6, total / 1e6)

    return log


def _write_weights(
    checkpoint: Checkpoint, precision: Precision, partial: Path, digest: str, report: OnProgress
) -> list[TensorEntry]:
    weights = checkpoint.weights()
    journal = Journal(partial / _JOURNAL, digest)
    file = partial / WEIGHTS
    file.touch()
    with file.open("r+b") as stream:
        # Reserving all of it first turns a full disk into an error now instead of minutes later.
        total = sum(_size(weight, precision) for weight in weights)
        os.posix_fallocate(stream.fileno(), 0, total)
        entries = [entry for written in journal.recover(stream) for entry in written]
        names = {entry.name for entry in entries}
        stream.seek(max((entry.offset + entry.nbytes for entry in entries), default=0))
        for weight in weights:
            if weight.name in names:
                continue
            if precision == "int8" and weight.kind != "plain":
                written = _write_int8(stream, checkpoint, weight)
            else:
                written = [_write_float(stream, checkpoint, weight, _DTYPES[precision])]
            stream.flush()
            journal.add(written)
            entries += written
            report(stream.tell(), total)
        stream.truncate()
        os.fsync(stream.fileno())
    return entries


def _finite_blocks(checkpoint: Checkpoint, weight: Weight) -> Iterator[NDArray[np.float32]]:
    """The blocks, fp32, with the weight's offset added; every precision starts from these."""
    for block in checkpoint.blocks(weight):
        if not np.isfinite(block).all():
            names = ", ".join(source.name for source in weight.sources)
            raise CheckpointError(f"{checkpoint.folder} holds values that are not finite in {names}")
        yield block + np.float32(weight.offset) if weight.offset else block


def _size(weight: Weight, precision: Precision) -> int:
    count = int(np.prod(weight.shape))
    if precision == "int8" and weight.kind != "plain":
        return _aligned(count) + _aligned(4 * weight.shape[0])
    return _aligned(np.dtype(_DTYPES[precision]).itemsize * count)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _write_float(stream: BinaryIO, checkpoint: Checkpoint, weight: Weight, dtype: FloatType) -> TensorEntry:
    writer = _TensorWriter(stream, weight.name, dtype, weight.shape)
    for block in _finite_blocks(checkpoint, weight):
        with np.errstate(over="ignore"):  # looked for below
            narrowed = block.astype(dtype, copy=False)
        if not np.isfinite(narrowed).all():
            names = ", ".join(source.name for source in weight.sources)
            raise CheckpointError(
                f"{checkpoint.folder}: {names} holds {np.abs(block).max():g}, which {dtype} cannot;"
                f" choose precision {_WIDER[dtype]}"
            )
        writer.write(narrowed)
    return writer.entry()


def _write_int8(stream: BinaryIO, checkpoint: Checkpoint, weight: Weight) -> list[TensorEntry]:
    values = _TensorWriter(stream, weight.name, "int8", weight.shape)
    scales = []
    for block in _finite_blocks(checkpoint, weight):
        quantised, scale = quantise_rows(block)
        values.write(quantised)
        scales.append(scale)
    entry = values.entry()
    name = weight.name.removesuffix(".weight") + ".scale"
    writer = _TensorWriter(stream, name, "float32", (weight.shape[0],))
    writer.write(np.concatenate(scales))
    return [entry, writer.entry()]


class _TensorWriter:
    """Appends one tensor's blocks at the next aligned offset of a file."""

    def __init__(self, stream: BinaryIO, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self._stream = stream
        self._name, self._dtype, self._shape = name, dtype, shape
        self._offset = _aligned(stream.tell())
        self._checksum = xxhash.xxh3_64()
        stream.seek(self._offset)

    def write(self, block: NDArray[Any]) -> None:
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)  # numpy shares no bfloat16 with other writers
        self._checksum.update(data)
        self._stream.write(data.data)

    def entry(self) -> TensorEntry:
        nbytes = self._stream.tell() - self._offset
        return TensorEntry(self._name, self._dtype, self._shape, self._offset, nbytes, self._checksum.hexdigest())
