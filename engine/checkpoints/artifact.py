"""The converted weights on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engine.spec import ModelSpec, Precision


class Artifact:
    """Converted weights of one checkpoint in one precision, memory-mapped."""

    digest: str  # hex; names weights and precision
    spec: ModelSpec
    precision: Precision
    weight_bytes: int
    weights_path: Path

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view into the mapped file."""
        raise NotImplementedError
