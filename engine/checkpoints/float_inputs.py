"""Which linear layers of an int8 artifact read 16-bit activations: measured once, kept beside the weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection

from engine.checkpoints.artifact import Artifact
from engine.files import replace_file

FILE = "float_inputs.json"
TOWER_FILE = "tower_float_inputs.json"
_VERSION = 1  # raise it when they are chosen in another way
_log = logging.getLogger("engine.checkpoints")


def read_float_inputs(artifact: Artifact, known: Collection[str], file: str = FILE) -> frozenset[str] | None:
    """Names of linear layers, all among `known`; None if not kept, or for other weights, or by another rule."""
    try:
        kept = json.loads((artifact.folder / file).read_bytes())
        names = kept["layers"] if (kept["version"], kept["digest"]) == (_VERSION, artifact.digest) else None
        return frozenset(names) if isinstance(names, list) and set(names) <= set(known) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_float_inputs(artifact: Artifact, layers: frozenset[str], file: str = FILE) -> None:
    """Under another name and renamed. What cannot be kept is measured again at the next start."""
    path = artifact.folder / file
    text = json.dumps({"version": _VERSION, "digest": artifact.digest, "layers": sorted(layers)}, indent=1)
    try:
        replace_file(path, text.encode())
    except OSError as error:
        _log.warning("%s cannot be written (%s); it is measured at every start", path, error.strerror)
