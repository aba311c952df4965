"""Which linear layers of an int8 vision tower read 16-bit activations: those whose rounding changes features too much.

Towers have layers with outliers as language models have them ("Vision transformers need registers", arXiv:2309.16588).
What rounding costs is measured on the fixed picture that int8 KV ranges are measured on too, where it shows: in the
features that the decoder reads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoints import Artifact
from engine.checkpoints.float_inputs import TOWER_FILE, read_float_inputs, write_float_inputs
from engine.graphs.cuda import CudaGraph
from engine.graphs.cuda.tower import rounded_tower, tower_linears
from engine.runners.calibration import calibration_image
from engine.runners.float_inputs import WithFlags, choose_float_inputs
from engine.runtime.cuda.encoder import CudaEncoder
from engine.runtime.cuda.session import GraphSession
from engine.runtime.encoder import TowerInput
from engine.spec import FloatType

BUDGET = 0.01
"""Of what sets features apart from place to place: errors of a tenth of their deviation."""

_log = logging.getLogger("engine.runners")


def tower_float_inputs(
    folder: Path,
    artifact: Artifact,
    activations: FloatType,
    device: torch.device,
    open_session: Callable[[CudaGraph], GraphSession],
) -> frozenset[str]:
    """As kept beside the artifact, or else measured and kept there.

    `folder` is the checkpoint's, `open_session` opens a tower's graph over weights that are on the device already.
    Raises torch.OutOfMemoryError.
    """
    names = {layer.name for layer in tower_linears(artifact)}
    chosen = read_float_inputs(artifact, names, TOWER_FILE)
    if chosen is None:
        image = calibration_image(folder, artifact.spec)
        chosen = measured_tower_inputs(artifact, activations, device, open_session, image)
        write_float_inputs(artifact, chosen, TOWER_FILE)
        _log.info("%d of %d linear layers of the vision tower read 16-bit activations", len(chosen), len(names))
    return chosen


def measured_tower_inputs(
    artifact: Artifact,
    activations: FloatType,
    device: torch.device,
    open_session: Callable[[CudaGraph], GraphSession],
    image: TowerInput,
    budget: float = BUDGET,
) -> frozenset[str]:
    rounding = TowerRounding(artifact, activations, device, open_session, image)
    sizes = {name: math.prod(artifact.entries[f"{name}.weight"].shape) for name in rounding.names}
    return choose_float_inputs(sizes, rounding.change, budget)


class TowerRounding:
    """One image's features with any layers' activations rounded, against those with none."""

    def __init__(
        self,
        artifact: Artifact,
        activations: FloatType,
        device: torch.device,
        open_session: Callable[[CudaGraph], GraphSession],
        image: TowerInput,
    ) -> None:
        self.names = tuple(layer.name for layer in tower_linears(artifact))
        self._flags = torch.zeros(len(self.names), dtype=torch.int32, device=device)
        session = WithFlags(open_session(rounded_tower(artifact, activations)), self._flags)
        self._encoder = CudaEncoder(session, artifact.spec, activations, device)
        self._image = image
        self._exact = self.features(frozenset())

    def change(self, rounded: frozenset[str]) -> float:
        """Of features when these layers are rounded: their squares' sum, over that of what sets features apart."""
        error = (self.features(rounded) - self._exact).square().sum()
        return float(error / (self._exact - self._exact.mean(0)).square().sum())

    def features(self, rounded: frozenset[str]) -> torch.Tensor:
        """float32 [tokens, feature_width]."""
        self._flags.copy_(torch.tensor([int(name in rounded) for name in self.names], dtype=torch.int32))
        return self._encoder.encode([self._image])[0].float()
