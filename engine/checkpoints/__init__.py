"""Read a Hugging Face folder, quantise it, keep the result on disk."""

from engine.checkpoints.artifact import Artifact
from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.convert import open_artifact

__all__ = ["Artifact", "Checkpoint", "open_artifact"]
