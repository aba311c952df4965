"""ONNX Runtime's CPU provider behind the protocol of a CUDA session, for graphs of operators that both have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped]
import torch

from engine.graphs.cuda import CudaGraph
from engine.kernels.bridge.tensors import ELEMENT_TYPES
from engine.runtime.cuda.session import Binding


class CpuProviderSession:
    """Implements GraphSession; graph numbers mean nothing."""

    def __init__(
        self,
        graph: CudaGraph,
        weights: Mapping[str, torch.Tensor],
        folder: Path,
        register: Callable[[ort.SessionOptions], None] | None = None,
    ) -> None:
        self._graph = graph
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self._weights = {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in weights.items()}
        if register is not None:
            register(options)
        for name, value in self._weights.items():
            options.add_initializer(name, value)
        self._session = ort.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])

    def bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        reuse: Binding | None = None,
    ) -> Binding:
        binding = self._session.io_binding()
        for name in self._graph.inputs:
            binding.bind_input(name, *_place(inputs[name]))
        for name in self._graph.outputs:
            binding.bind_output(name, *_place(outputs[name]))
        return _Bound(binding, (inputs, outputs))

    def run(self, binding: Binding, graph: int | None = None) -> None:
        assert isinstance(binding, _Bound)
        self._session.run_with_iobinding(binding.io)


class _Bound:
    def __init__(self, io: Any, tensors: Any) -> None:
        self.io = io
        self._kept = tensors


def _place(tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
    assert tensor.is_contiguous()
    return "cpu", 0, ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr()
