"""Names of what is cached: a digest of everything that changes it."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.request import SamplingParams

ANSWER_KEY_VERSION = 1
FEATURE_KEY_VERSION = 1
_OFF_WHEN_GREEDY = ("temperature", "top_p", "top_k", "min_p", "seed")


def answer_key(
    model_digest: str, token_ids: NDArray[np.integer], image_keys: Sequence[bytes], params: SamplingParams
) -> bytes:
    """The name [32 bytes] of the answer to a deterministic request. Raises ValueError if it is not deterministic.

    `model_digest` names weights and precision, `token_ids` is the prompt with its image placeholders, `image_keys` the
    images in reading order. Greedy requests that differ only in parameters of the draw share a name.
    """
    if not params.is_deterministic:
        raise ValueError("an answer that is drawn without a seed has no key")
    fields: list[object] = ["answer", ANSWER_KEY_VERSION, model_digest]
    fields.append(np.ascontiguousarray(token_ids, "<i8").tobytes())
    fields.append(tuple(image_keys))
    for field in dataclasses.fields(params):
        if not (params.is_greedy and field.name in _OFF_WHEN_GREEDY):
            fields += [field.name, _plain(getattr(params, field.name), field.type)]
    return _digest(fields)


def feature_key(image_key: bytes, encoder_digest: str) -> bytes:
    """The name [32 bytes] of an image's features. `image_key` covers the image's bytes and the processor's settings."""
    return _digest(["features", FEATURE_KEY_VERSION, image_key, encoder_digest])


def _plain(value: object, declared: object) -> object:
    """A number given as 1 and as 1.0, or as 0.0 and as -0.0, is one value where the field is a float."""
    return float(value) + 0.0 if declared in ("float", float) and isinstance(value, int | float) else value


def _digest(fields: Iterable[object]) -> bytes:
    hasher = hashlib.blake2b(digest_size=32, person=b"tessera-cache")
    for field in fields:
        hasher.update(_encode(field))
    return hasher.digest()


def _encode(value: object) -> bytes:
    """Type, length and content, so that no two sequences of fields have the same encoding."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"B" + bytes([value])
        case int():
            return b"I" + value.to_bytes(9, "little", signed=True)
        case float():
            return b"F" + struct.pack("<d", value)
        case str():
            content = value.encode("utf-8", "surrogatepass")
            return b"S" + len(content).to_bytes(8, "little") + content
        case bytes():
            return b"Y" + len(value).to_bytes(8, "little") + value
        case tuple():
            return b"T" + len(value).to_bytes(8, "little") + b"".join(_encode(item) for item in value)
    raise TypeError(f"a cache key cannot hold {value!r}")
