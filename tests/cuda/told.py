"""What an engine of given settings answers, to be compared with one of other settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request
from tests.engine.asking import ask

Told = tuple[str, str, int, int]
"""Text, reason, tokens, and how many of the prompt's were reused."""


def told(storage: Path, requests: Sequence[Request], *, times: int = 4, **settings: Any) -> list[Told]:
    """The answers to requests that are asked together, as often as `times` says."""
    fixed = {"storage": storage, "cache_enabled": False, "max_batch_size": 4}
    engine = Engine(EngineConfig.from_mapping(fixed | settings))
    try:
        results = []
        for _ in range(times):
            answers = [ask(engine, one) for one in requests]
            for answer in answers:
                result = answer.wait().result
                assert answer.finished is not None
                results.append((*result, answer.finished.usage.reused_tokens))
        return results
    finally:
        engine.close()


def shared_text(found: Sequence[Told], wanted: Sequence[Told]) -> float:
    """The mean share of an answer's characters before the first that differs."""
    shares = [_alike(one[0], other[0]) for one, other in zip(found, wanted, strict=True)]
    return sum(shares) / len(shares)


def _alike(one: str, other: str) -> float:
    """The share of the characters before the first that differs."""
    same = next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    return same / max(1, len(one), len(other))
