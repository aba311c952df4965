"""Which linear layers of an int8 model read 16-bit activations: those whose rounding costs predictions too much.

A language model has a few channels, and a few tokens, whose activations are hundreds of times larger than the rest
("massive activations", arXiv:2402.17762); one scale for a token then leaves little of its other channels. How much that
costs cannot be seen in the layer: of two that lose as much of their input's energy, one may change the predictions a
hundred times as much as the other. So it is measured where it shows, in the distributions of the next token, on the
fixed text that int8 KV ranges are measured on too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from engine.checkpoints import Artifact
from engine.checkpoints.float_inputs import read_float_inputs, write_float_inputs
from engine.graphs.cuda import CudaGraph
from engine.graphs.cuda.rounded import ROUNDED, linear_names, rounded_decoder
from engine.runners.calibration import calibration_decoder, calibration_step
from engine.runners.cuda import VisionTower
from engine.runtime.cuda.session import Binding, GraphSession
from engine.runtime.cuda.step import PackedStep
from engine.runtime.cuda.weights import torch_type
from engine.spec import FloatType

BUDGET = 0.0025
"""Nats a token: a quarter of the 1 % of perplexity that int8 may cost in all. Weights take about half a per cent."""

_ROWS = 64  # of logits that are compared at once
_log = logging.getLogger("engine.runners")

Divergence = Callable[[frozenset[str]], float]
"""Mean divergence, in nats a token, of the predictions with these layers' activations rounded."""


def choose_float_inputs(sizes: Mapping[str, int], divergence: Divergence, budget: float = BUDGET) -> frozenset[str]:
    """The layers that read 16-bit activations, so that rounding all others' costs `budget` at most.

    `sizes` are the layers' numbers of weights: the layers that cost least for each multiplication are rounded first.
    A model without outliers takes one measurement, another two for each layer at most.
    """
    every = frozenset(sizes)
    if divergence(every) <= budget:
        return frozenset()
    costs = {name: divergence(frozenset([name])) for name in sizes}
    # In 16 bits any change rounds everything behind it anew. What the least of the layers costs is little else.
    floor = min(costs.values(), key=lambda cost: math.inf if math.isnan(cost) else cost)
    rounded: list[str] = []
    total = 0.0
    for name in sorted(sizes, key=lambda name: (costs[name] - floor) / sizes[name]):
        cost = costs[name] - floor
        if total + cost <= budget:  # false for what is not a number
            rounded.append(name)
            total += cost
    while (
        rounded and not divergence(frozenset(rounded)) - floor <= budget
    ):  # together they may cost more than one by one
        rounded.pop()
    return every - frozenset(rounded)


def float_inputs(
    folder: Path,
    artifact: Artifact,
    activations: FloatType,
    open_session: Callable[[CudaGraph], GraphSession],
    tower: VisionTower | None,
    device: torch.device,
) -> frozenset[str]:
    """As kept beside the artifact, or else measured and kept there.

    `folder` is the checkpoint's, `open_session` opens a graph with fused linear layers over weights that are on the
    device already. Raises torch.OutOfMemoryError.
    """
    names = linear_names(artifact.spec.decoder)
    chosen = read_float_inputs(artifact, names)
    if chosen is None:
        step = calibration_step(folder, artifact.spec, tower)
        chosen = measured_float_inputs(artifact, activations, open_session, step, device)
        write_float_inputs(artifact, chosen)
        _log.info("%d of %d linear layers read 16-bit activations", len(chosen), len(names))
    return chosen


def measured_float_inputs(
    artifact: Artifact,
    activations: FloatType,
    open_session: Callable[[CudaGraph], GraphSession],
    step: PackedStep,
    device: torch.device,
    budget: float = BUDGET,
) -> frozenset[str]:
    """`step` is one sequence from its beginning, in blocks 1, 2, ..."""
    names = linear_names(artifact.spec.decoder)
    rounding = Rounding(artifact, activations, open_session, step, device, names)
    try:
        sizes = {name: math.prod(artifact.entries[f"{name}.weight"].shape) for name in names}
        return choose_float_inputs(sizes, rounding.divergence, budget)
    finally:
        rounding.close()


class Rounding:
    """One sequence's predictions with any layers' activations rounded, against those with none."""

    def __init__(
        self,
        artifact: Artifact,
        activations: FloatType,
        open_session: Callable[[CudaGraph], GraphSession],
        step: PackedStep,
        device: torch.device,
        names: tuple[str, ...],
    ) -> None:
        self._step = _text_logits(step)
        self._names = names
        self._flags = torch.zeros(len(names), dtype=torch.int32, device=device)
        session = WithFlags(open_session(rounded_decoder(artifact, activations, len(step.ids))), self._flags)
        dtype = torch_type(activations)
        self._decoder = calibration_decoder(session, artifact.spec.decoder, self._step, dtype, device)
        self._exact = self.logits(frozenset()).clone()

    def divergence(self, rounded: frozenset[str]) -> float:
        return mean_divergence(self._exact, self.logits(rounded))

    def close(self) -> None:
        self._decoder.close()

    def logits(self, rounded: frozenset[str]) -> torch.Tensor:
        """Of every text token, [R, vocab], until the next call."""
        flags = [int(name in rounded) for name in self._names]
        self._flags.copy_(torch.tensor(flags, dtype=torch.int32))
        return self._decoder.run(self._step)[0]


class WithFlags:
    """Implements GraphSession: a session whose graph has the input ROUNDED, of which its caller does not know."""

    def __init__(self, session: GraphSession, flags: torch.Tensor) -> None:
        self._session = session
        self._flags = flags

    def bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        reuse: Binding | None = None,
    ) -> Binding:
        return self._session.bind({**inputs, ROUNDED: self._flags}, outputs, reuse)

    def run(self, binding: Binding, graph: int | None = None) -> None:
        self._session.run(binding, graph)


def _text_logits(step: PackedStep) -> PackedStep:
    """The step with logits of every text token; nobody reads what a model predicts within an image."""
    index = step.feature_index
    rows = np.arange(len(step.ids)) if index is None else np.flatnonzero(index < 0)
    return replace(step, logits_rows=rows.astype(np.int32), slots=np.arange(len(rows), dtype=np.int32))


def mean_divergence(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Kullback-Leibler divergence of `found` from `exact`, logits [R, vocab]; nats, the mean over rows."""
    total = torch.zeros((), dtype=torch.float64, device=exact.device)
    for start in range(0, len(exact), _ROWS):
        wanted, given = (torch.log_softmax(x[start : start + _ROWS].float(), -1) for x in (exact, found))
        total += (wanted.exp() * (wanted - given)).sum(dtype=torch.float64)
    return float(total) / len(exact)
