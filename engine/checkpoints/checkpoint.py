"""A checkpoint folder in Hugging Face layout: config.json and safetensors files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose files are present and well-formed."""

    folder: Path
    spec: ModelSpec
    digest: str  # hex; names the content cheaply: file names, sizes, modification times and header hashes

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Raises CheckpointError naming the missing or malformed file or tensor."""
        raise NotImplementedError
