"""Image features by content: an image that was seen before is not encoded again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.cache.record import Kind, decode_array, encode_array
from engine.cache.store import CLOSE_TIMEOUT_S, Store

FOLDER = "features-v1"


class FeatureCache:
    """Arrays [tokens, hidden] in `folder`/features-v1. Nothing here waits for a disk; one that fails is an empty cache.

    Features stay in the type in which they were computed: in less, a repeated image could get other tokens than a new
    one. They do not expire, since their key holds all that they depend on.
    """

    def __init__(self, folder: Path, *, size_limit_bytes: int) -> None:
        self._store = Store(folder / FOLDER, size_limit_bytes=size_limit_bytes, encode=_encode, decode=_decode)

    def get(self, key: bytes) -> NDArray[np.floating] | None:
        """The features, read-only, bit for bit as they were put."""
        return self._store.get(key)

    def put(self, key: bytes, features: NDArray[np.floating]) -> None:
        """Keep a copy of float32 or float16 features [tokens, hidden], soon.

        Raises ValueError for another type or shape.
        """
        if features.ndim != 2 or features.dtype not in (np.float32, np.float16):
            raise ValueError(f"features of shape {features.shape} and type {features.dtype}")
        copy = np.array(features, order="C", copy=True)
        copy.flags.writeable = False
        self._store.put(key, copy, nbytes=copy.nbytes, expiry_s=None)

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Wait until what was put is on disk; False when that took too long."""
        return self._store.flush(timeout_s)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Write out what is queued, within the time limit; False when some of it was left."""
        return self._store.close(timeout_s)


def _encode(key: bytes, features: NDArray[np.floating]) -> bytes:
    return encode_array(Kind.FEATURES, key, features)


def _decode(key: bytes, blob: object) -> NDArray[np.floating] | None:
    return decode_array(Kind.FEATURES, key, blob)
