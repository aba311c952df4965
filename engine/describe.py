"""What a checkpoint can do, for Dify's form: read from its configuration by the code that runs it.

The families need numpy, which the protocol process must not import, so that is an errand; its answer is kept until
config.json changes.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from engine import errand
from engine.errors import CheckpointError

LIMIT_S = 10.0  # reading takes a third of a second; a machine under load takes its time
CONFIG = "config.json"
_reading = threading.Lock()


@dataclass(frozen=True, slots=True)
class Description:
    """`context` is in tokens, prompt and output together."""

    context: int
    vision: bool = False


def describe(folder: Path) -> Description:
    """Raises CheckpointError for a folder without a readable config.json, or for one that the engine does not run."""
    try:
        changed = (folder / CONFIG).stat().st_mtime_ns
    except OSError:
        raise CheckpointError(f"{folder} has no {CONFIG}; give the folder of a Hugging Face checkpoint") from None
    with _reading:  # once, however many ask at the same time
        return _described(folder, changed)


@functools.lru_cache(maxsize=256)
def _described(folder: Path, changed: int) -> Description:  # noqa: ARG001 - part of the key
    lines = errand.ask("engine.describe", str(folder), LIMIT_S)
    if not lines:
        raise CheckpointError(f"{folder} was not read within {LIMIT_S:g} seconds; try again")
    return Description(**lines[0])


def _look(folder: str, write: errand.Write) -> None:
    from engine.checkpoints.checkpoint import read_config  # numpy, which the protocol process must not import
    from engine.families import family_for

    config = read_config(Path(folder))
    try:
        spec = family_for(config.model).spec(config)
    except CheckpointError as error:  # names the file; the folder is ours to name
        raise CheckpointError(f"{folder}: {error}") from error
    write(asdict(Description(spec.decoder.context_length, vision=spec.vision is not None)))


if __name__ == "__main__":
    errand.answer(_look)
