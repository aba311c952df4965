"""Whole answers of deterministic requests, kept until they expire."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from engine.cache.record import Kind, decode_bytes, encode_bytes
from engine.cache.store import CLOSE_TIMEOUT_S, Store
from engine.request import FinishReason, Usage

FOLDER = "answers-v1"
EXPIRY_JITTER = 0.1  # entries of one moment do not expire at one moment
_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
_FIELDS = struct.Struct("<B4Q")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request got, enough to stream it again."""

    text: str
    reason: FinishReason
    usage: Usage


class AnswerCache:
    """Answers in `folder`/answers-v1. Nothing here raises or waits for a disk; a disk that fails is an empty cache."""

    def __init__(self, folder: Path, *, size_limit_bytes: int, expiry_s: float) -> None:
        self._expiry_s = expiry_s
        self._store = Store(folder / FOLDER, size_limit_bytes=size_limit_bytes, encode=_encode, decode=_decode)

    def get(self, key: bytes) -> Answer | None:
        return self._store.get(key)

    def put(self, key: bytes, answer: Answer) -> None:
        """Keep an answer, soon."""
        expiry = self._expiry_s * random.uniform(1 - EXPIRY_JITTER, 1 + EXPIRY_JITTER)
        self._store.put(key, answer, nbytes=len(answer.text), expiry_s=expiry)

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Wait until what was put is on disk; False when that took too long."""
        return self._store.flush(timeout_s)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Write out what is queued, within the time limit; False when some of it was left."""
        return self._store.close(timeout_s)


def _encode(key: bytes, answer: Answer) -> bytes:
    usage = answer.usage
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.image_tokens, usage.reused_tokens)
    fields = _FIELDS.pack(_REASONS.index(answer.reason), *counts)
    return encode_bytes(Kind.ANSWER, key, fields + answer.text.encode("utf-8", "surrogatepass"))


def _decode(key: bytes, blob: object) -> Answer | None:
    payload = decode_bytes(Kind.ANSWER, key, blob)
    if payload is None or len(payload) < _FIELDS.size:
        return None
    reason, *counts = _FIELDS.unpack_from(payload)
    if reason >= len(_REASONS):
        return None
    try:
        text = payload[_FIELDS.size :].decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return Answer(text, _REASONS[reason], Usage(*counts))
