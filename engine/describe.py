"""What a checkpoint can do, for Dify's form: read from its configuration and chat template by the code that runs it.

The families need numpy, which the protocol process must not import, so that is an errand; its answer is kept until
a file changes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine import errand
from engine.errors import CheckpointError

LIMIT_S = 10.0  # reading takes a third of a second; a machine under load takes its time
CONFIG = "config.json"
# All that is read, CONFIG last: whoever fetches them in this order has them all when it is there.
FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json", CONFIG)
_reading = threading.Lock()


@dataclass(frozen=True, slots=True)
class Description:
    """`context` is in tokens, prompt and output together."""

    context: int
    vision: bool = False
    video: bool = False
    tools: bool = False  # its chat template teaches calls in a form that the engine reads
    thinking: bool = False  # it may reason before it answers, and can be told not to


def describe(folder: Path) -> Description:
    """Raises CheckpointError for a folder without a readable config.json, or for one that the engine does not run."""
    changed = tuple(_changed(folder / name) for name in FILES)
    if not changed[-1]:
        raise CheckpointError(f"{folder} has no {CONFIG}; give the folder of a Hugging Face checkpoint")
    with _reading:  # once, however many ask at the same time
        return _described(folder, changed)


def _changed(file: Path) -> int:
    """When the file was last changed, in nanoseconds; 0 when there is none."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=256)
def _described(folder: Path, changed: tuple[int, ...]) -> Description:  # noqa: ARG001 - part of the key
    lines = errand.ask("engine.describe", str(folder), LIMIT_S)
    if not lines:
        raise CheckpointError(f"{folder} was not read within {LIMIT_S:g} seconds; try again")
    return Description(**lines[0])


def _look(folder: str, write: errand.Write) -> None:
    from engine.checkpoints.checkpoint import read_config  # numpy, which the protocol process must not import
    from engine.families import family_for
    from engine.prompts.template import ChatTemplate

    config = read_config(Path(folder))
    try:
        spec = family_for(config.model).spec(config)
    except CheckpointError as error:  # names the file; the folder is ours to name
        raise CheckpointError(f"{folder}: {error}") from error
    description = Description(spec.decoder.context_length, vision=spec.vision is not None)
    with contextlib.suppress(CheckpointError):  # without a template it can do no more; loading it says so
        template = ChatTemplate(Path(folder), has_images=description.vision)
        description = replace(
            description,
            video=spec.tokens.video is not None and template.shows_videos,
            tools=template.tool_format is not None,
            thinking=template.may_think,
        )
    write(asdict(description))


if __name__ == "__main__":
    errand.answer(_look)
