"""A model's sessions on a device that is not there: which operators they are made of, and what is measured for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.cuda.fused_operators  # noqa: F401  (registers the operators)
from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.checkpoints.float_inputs import FILE, TOWER_FILE, write_float_inputs
from engine.config import EngineConfig
from engine.graphs.cuda import CudaGraph
from engine.graphs.cuda.fused import STOCK, Fusion
from engine.graphs.cuda.rounded import ROUNDED
from engine.graphs.cuda.tower import TowerInputs, tower_linears
from engine.runners import sessions
from engine.runners.fusion import Parts
from engine.runners.sessions import Sessions, open_sessions
from engine.runtime.cuda import encoder
from tests.cuda.reference import ReferenceSession

CPU = torch.device("cpu")
FUSED = Fusion(linear=True, attention=True, tower=True)
MODEL = "tiny-smolvlm"


def register(_: object) -> None:
    """Stands for the operators of our own."""


class Opened:
    """Takes the place of `CudaSession`."""

    def __init__(self) -> None:
        self.graphs: list[CudaGraph] = []
        self.told: list[object] = []

    def __call__(
        self,
        graph: CudaGraph,
        weights: Mapping[str, torch.Tensor],
        folder: Path,
        device: torch.device,
        register: Any = None,
        **_: bool,
    ) -> ReferenceSession:
        self.graphs.append(graph)
        self.told.append(register)
        return ReferenceSession(graph.model, weights)

    @property
    def towers(self) -> list[CudaGraph]:
        return [graph for graph in self.graphs if TowerInputs.PIXELS in graph.inputs]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    made = Opened()
    monkeypatch.setattr(sessions, "CudaSession", made)
    monkeypatch.setattr(encoder, "CudaSession", made)
    monkeypatch.setattr(sessions, "open_fusion", lambda wanted, *_: (wanted, register if wanted != STOCK else None))
    return made


@pytest.fixture
def artifact(storage: Path, tmp_path: Path) -> Artifact:
    return open_artifact(Checkpoint.open(storage / "models" / MODEL), "int8", tmp_path)


def opening(artifact: Artifact, storage: Path, fusion: Fusion, *, measured: bool = True) -> Sessions:
    parts = Parts(fusion, measured_inputs=measured)
    config = EngineConfig(storage=storage)
    return open_sessions(MODEL, artifact, config, "float16", CPU, step_tokens=64, block_size=256, parts=parts)


def test_a_fused_model_has_a_fused_tower_and_both_are_measured_once(
    opened: Opened, artifact: Artifact, storage: Path
) -> None:
    found = opening(artifact, storage, FUSED)
    assert found.fusion.tower
    assert [ROUNDED in graph.inputs for graph in opened.towers] == [True, False], "measured, then opened"
    assert all(told is register for told in opened.told)
    assert {file.name for file in artifact.folder.glob("*float*")} == {FILE, TOWER_FILE}
    assert found.tower is not None
    assert found.tower.weight_bytes < sum(
        entry.nbytes for name, entry in artifact.entries.items() if name.startswith("vision.")
    )
    opened.graphs.clear()
    opening(artifact, storage, FUSED)
    assert [ROUNDED in graph.inputs for graph in opened.graphs if ROUNDED in graph.inputs] == []


def test_what_was_chosen_of_tower_and_decoder_are_the_layers_with_16_bit_rows(
    opened: Opened, artifact: Artifact, storage: Path
) -> None:
    tower = tower_linears(artifact)[2].name
    write_float_inputs(artifact, frozenset([tower]), TOWER_FILE)
    write_float_inputs(artifact, frozenset(["layers.0.down"]))
    assert opening(artifact, storage, FUSED).fusion.float_inputs == {tower, "layers.0.down"}
    assert opening(artifact, storage, FUSED, measured=False).fusion.float_inputs == frozenset()


def test_a_tower_that_is_switched_off_is_stock_and_nothing_is_measured_for_it(
    opened: Opened, artifact: Artifact, storage: Path
) -> None:
    found = opening(artifact, storage, replace(FUSED, tower=False))
    (tower,) = opened.towers
    assert opened.told[opened.graphs.index(tower)] is None
    assert {weight.form for weight in tower.weights} == {"plain"}
    assert not (artifact.folder / TOWER_FILE).exists()
    assert found.tower is not None
