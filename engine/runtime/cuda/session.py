"""ONNX Runtime sessions on one CUDA device, and device tensors bound to their inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import onnxruntime as ort  # type: ignore[import-untyped]
import torch

from engine.graphs.cuda import CudaGraph

# ONNX's numbers, because numpy has no name for bfloat16.
_ELEMENT_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int32: 6,
    torch.int64: 7,
    torch.float16: 10,
    torch.bfloat16: 16,
}
_EAGER = -1
_PROVIDER = {
    "enable_cuda_graph": "1",
    "arena_extend_strategy": "kSameAsRequested",
    "use_tf32": "0",
}


class Binding(Protocol):
    """Tensors at fixed addresses; whatever they hold when a run executes is what it reads."""


class GraphSession(Protocol):
    """One graph on one device. One thread only: captured CUDA graphs belong to the thread that captured them."""

    def bind(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> Binding:
        """Contiguous tensors on the device, or on the host for what the graph reads there."""
        ...

    def run(self, binding: Binding, graph: int | None = None) -> None:
        """Enqueue a run on the device's stream and return.

        The first run of a `graph` number executes three times and captures; later ones replay what was captured, with
        the values that host inputs had then. None runs operator by operator.
        """
        ...


class _TensorBinding:
    def __init__(
        self, session: ort.InferenceSession, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
    ) -> None:
        self.io = session.io_binding()
        self._tensors = [*inputs.values(), *outputs.values()]  # kept alive
        for name, tensor in inputs.items():
            self.io.bind_input(name, *_place(tensor))
        for name, tensor in outputs.items():
            self.io.bind_output(name, *_place(tensor))


def _place(tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous")
    device = tensor.device
    return device.type, device.index or 0, _ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr()


class CudaSession:
    """Implements `GraphSession` on torch's current stream of `device` at the time of construction."""

    def __init__(
        self, graph: CudaGraph, weights: Mapping[str, torch.Tensor], folder: Path, device: torch.device
    ) -> None:
        """`weights` are on the device; `folder` is the artifact's, where the graph says its weights are."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # The graph is final as it stands. Fusions would rob MatMulNBits of its fast kernels, and constant folding
        # would read weights from the file.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # A memory plan is kept for every combination of shapes ever seen, and those of prefill and images never end.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
        self._weights = {weight.name: ort.OrtValue.from_dlpack(weights[weight.name]) for weight in graph.weights}
        for name, value in self._weights.items():
            options.add_initializer(name, value)
        provider = _PROVIDER | {
            "device_id": str(device.index or 0),
            "user_compute_stream": str(torch.cuda.current_stream(device).cuda_stream),
        }
        self._session = ort.InferenceSession(graph.model, options, providers=[("CUDAExecutionProvider", provider)])
        self._session.disable_fallback()
        self._run_options: dict[int, ort.RunOptions] = {}

    def bind(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> Binding:
        return _TensorBinding(self._session, inputs, outputs)

    def run(self, binding: Binding, graph: int | None = None) -> None:
        assert isinstance(binding, _TensorBinding)
        self._session.run_with_iobinding(binding.io, self._options(_EAGER if graph is None else graph))

    def _options(self, graph: int) -> ort.RunOptions:
        if graph not in self._run_options:
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(graph))
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._run_options[graph] = options
        return self._run_options[graph]
