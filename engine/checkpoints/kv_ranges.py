"""How large keys and values become, channel by channel: measured once, kept beside an artifact's weights."""

from __future__ import annotations

import logging

import numpy as np
import xxhash
from numpy.typing import NDArray

from engine.checkpoints.artifact import Artifact
from engine.files import replace_file

FILE = "kv_ranges.bin"  # digest of what follows, then float32
_VERSION = 1  # raise it when ranges are measured in another way
_DIGEST_BYTES = 16
_log = logging.getLogger("engine.checkpoints")


def read_kv_ranges(artifact: Artifact) -> NDArray[np.float32] | None:
    """[layers with a cache, 2, kv_heads, head_dim], or None if they were not kept or the file is damaged."""
    try:
        data = (artifact.folder / FILE).read_bytes()
    except OSError:
        return None
    digest, payload = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    shape = _shape(artifact)
    if digest != _digest(artifact, payload) or len(payload) != 4 * int(np.prod(shape)):
        return None
    return np.frombuffer(payload, "<f4").reshape(shape).astype(np.float32)


def write_kv_ranges(artifact: Artifact, ranges: NDArray[np.float32]) -> None:
    """Under another name and renamed. Ranges that cannot be kept are measured again at the next start."""
    assert ranges.shape == _shape(artifact)
    payload = np.ascontiguousarray(ranges, "<f4").tobytes()
    try:
        replace_file(artifact.folder / FILE, _digest(artifact, payload) + payload)
    except OSError as error:
        _log.warning("%s cannot be written (%s); it is measured at every start", artifact.folder / FILE, error.strerror)


def _digest(artifact: Artifact, payload: bytes) -> bytes:
    return xxhash.xxh3_128_digest(f"{artifact.digest} {_VERSION} ".encode() + payload)


def _shape(artifact: Artifact) -> tuple[int, int, int, int]:
    spec = artifact.spec.decoder
    return len(spec.attention_layers), 2, spec.kv_heads, spec.head_dim
