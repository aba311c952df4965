"""From a checkpoint to an artifact."""

from __future__ import annotations

from pathlib import Path

from engine.checkpoints.artifact import Artifact
from engine.checkpoints.checkpoint import Checkpoint
from engine.spec import Precision


def open_artifact(checkpoint: Checkpoint, precision: Precision, storage: Path) -> Artifact:
    """The artifact of this checkpoint and precision, converting it first unless a good one is in `storage`."""
    raise NotImplementedError
