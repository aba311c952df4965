"""Runs the vision tower and its connector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.artifact import Artifact


class TowerInput(Protocol):
    """What the tower needs of an `ImageInput`."""

    @property
    def pixels(self) -> NDArray[np.uint8]: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def tokens(self) -> int: ...


class Encoder:
    """One ONNX Runtime session; any thread, one call at a time."""

    def __init__(self, artifact: Artifact, *, threads: int) -> None:
        raise NotImplementedError

    def encode(self, images: Sequence[TowerInput]) -> list[NDArray[np.float32]]:
        """One [tokens, hidden] per image."""
        raise NotImplementedError
