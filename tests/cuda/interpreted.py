"""ONNX Runtime's CPU provider with our kernels as its operators, in a process whose Triton interprets."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from engine.graphs.builder import TESSERA
from engine.graphs.cuda import CudaGraph
from engine.kernels import bridge
from engine.kernels.operators import Device, decoder_operators
from engine.kernels.tiles import Tiles
from engine.kernels.workspace import Workspace
from tests.cuda.cpu_provider import CpuProviderSession

CPU = torch.device("cpu")
MULTIPROCESSORS = 4
TILES = Tiles(gemv_rows=0)  # rows are quantised however few they are, as the torch twins do it


def interpreted_session(
    graph: CudaGraph, weights: dict[str, torch.Tensor], place: Path, folder: Path, dtype: torch.dtype, nbytes: int
) -> CpuProviderSession:
    """`place` is the artifact's folder; our library is compiled into `folder`; kernels work in `nbytes`."""
    register = partial(
        bridge.register,
        domain=TESSERA,
        operators=decoder_operators(Device(dtype, Workspace(nbytes, CPU), TILES, MULTIPROCESSORS)),
        provider="CPUExecutionProvider",
        folder=folder,
    )
    return CpuProviderSession(graph, weights, place, register)
