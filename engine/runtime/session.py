"""ONNX Runtime sessions on the CPU, and arrays bound to their inputs and outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from engine.checkpoints.artifact import Artifact

_CONFIG = {
    # Weights are external data of the artifact's file, next to no model file.
    "session.model_external_initializers_file_folder_path": "",
    # Threads spin between the operators of a run, which are short, and sleep between runs: the other session, the
    # image workers and the protocol process need the cores.
    "session.intra_op.allow_spinning": "1",
    "session.force_spinning_stop": "1",
    # Without VNNI, products of u8 and s8 saturate at 16 bits; this makes them u8 and u8 there, which do not.
    "session.x64quantprecision": "1",
}


def open_session(model: bytes, artifact: Artifact, threads: int) -> ort.InferenceSession:
    """A session on `threads` threads whose weights are mapped from the artifact's file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The graphs hold fused operators already; basic is constant folding.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # A memory plan is kept for every combination of shapes ever seen, and ours never end.
    options.enable_mem_pattern = False
    # Planning which outputs may share memory compares each with all before it, and mostly in vain, because their sizes
    # are not known yet: half a second for a model of 2B. The arena hands out what was freed as fast.
    options.enable_mem_reuse = False
    for key, value in _CONFIG.items():
        options.add_session_config_entry(key, value or str(artifact.folder))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.disable_fallback()
    return session


class Binding:
    """Arrays bound by address; binding the same array again costs nothing."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._io = session.io_binding()
        # Keeps bound memory alive, and tells what is bound.
        self._bound: dict[str, NDArray[Any]] = {}

    def input(self, name: str, array: NDArray[Any]) -> None:
        """`array` must be contiguous; it is read at every run."""
        if self._bound.get(name) is not array:
            self._io.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self._bound[name] = array

    def output(self, name: str, array: NDArray[Any]) -> None:
        """`array` must be contiguous; it is written at every run."""
        if self._bound.get(name) is not array:
            self._io.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self._bound[name] = array

    def run(self) -> None:
        self._session.run_with_iobinding(self._io)


def run(
    session: ort.InferenceSession, inputs: dict[str, NDArray[Any]], output: str, *, shrink: bool = False
) -> NDArray[np.float32]:
    """One call with arrays of any shape, for one output; `shrink` gives its working memory back afterwards."""
    options = ort.RunOptions()
    if shrink:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    result: NDArray[np.float32] = session.run([output], inputs, options)[0]
    return result
