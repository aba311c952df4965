"""The format of a value on disk: a checksummed header and raw bytes. Whatever does not fit it exactly is no value.

    magic 4s | version u16 | kind u8 | dtype u8 | rows u32 | columns u32 | length u64 | xxh3-64 u64 | payload

The checksum covers the header before it, the cache key and the payload, so a value that strayed to another key is not
taken for that key's. It guards against damage, not against somebody who may write to the folder.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np
import xxhash
from numpy.typing import NDArray

VERSION = 1
_MAGIC = b"TSSR"
_FIELDS = struct.Struct("<4sHBBIIQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
_DTYPES: dict[int, np.dtype[np.floating]] = {1: np.dtype("<f4"), 2: np.dtype("<f2")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Kind(IntEnum):
    ANSWER = 1
    FEATURES = 2


def encode_bytes(kind: Kind, key: bytes, payload: bytes) -> bytes:
    return _encode(kind, 0, 0, 0, key, payload)


def decode_bytes(kind: Kind, key: bytes, blob: object) -> bytes | None:
    """The payload, or None for anything but a whole record of this kind, key and version."""
    fields = _decode(kind, key, blob)
    if fields is None or fields[:3] != (0, 0, 0):
        return None
    return bytes(fields[3])


def encode_array(kind: Kind, key: bytes, array: NDArray[np.floating]) -> bytes:
    """A float32 or float16 array [rows, columns], bit for bit. Raises ValueError for any other."""
    code = _CODES.get(array.dtype)
    if code is None or array.ndim != 2:
        raise ValueError(f"cannot keep an array of shape {array.shape} and type {array.dtype}")
    rows, columns = array.shape
    return _encode(kind, code, rows, columns, key, np.ascontiguousarray(array).tobytes())


def decode_array(kind: Kind, key: bytes, blob: object) -> NDArray[np.floating] | None:
    """The array [rows, columns], read-only and without a copy, or None as in `decode_bytes`."""
    fields = _decode(kind, key, blob)
    if fields is None or fields[0] not in _DTYPES:
        return None
    code, rows, columns, payload = fields
    dtype = _DTYPES[code]
    if len(payload) != rows * columns * dtype.itemsize:
        return None
    return np.frombuffer(payload, dtype).reshape(rows, columns)


def _encode(kind: Kind, code: int, rows: int, columns: int, key: bytes, payload: bytes) -> bytes:
    fields = _FIELDS.pack(_MAGIC, VERSION, kind, code, rows, columns, len(payload))
    return b"".join((fields, _CHECKSUM.pack(_checksum(fields, key, payload)), payload))


def _decode(kind: Kind, key: bytes, blob: object) -> tuple[int, int, int, memoryview] | None:
    if not isinstance(blob, bytes) or len(blob) < HEADER_BYTES:
        return None
    fields, payload = blob[: _FIELDS.size], memoryview(blob)[HEADER_BYTES:]
    magic, version, found, code, rows, columns, length = _FIELDS.unpack(fields)
    if (magic, version, found, length) != (_MAGIC, VERSION, kind, len(payload)):
        return None
    (checksum,) = _CHECKSUM.unpack_from(blob, _FIELDS.size)
    if checksum != _checksum(fields, key, payload):
        return None
    return code, rows, columns, payload


def _checksum(fields: bytes, key: bytes, payload: bytes | memoryview) -> int:
    state = xxhash.xxh3_64(fields)
    state.update(len(key).to_bytes(8, "little"))
    state.update(key)
    state.update(payload)
    return state.intdigest()
