"""ONNX Runtime sessions on one CUDA device, and device tensors bound to their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort  # type: ignore[import-untyped]
import torch

from engine.graphs.cuda import CudaGraph
from engine.kernels.bridge import operator_errors
from engine.kernels.bridge.tensors import ELEMENT_TYPES

ort.set_default_logger_severity(3)  # else a session's creation prints warnings about what is meant to be so

_EAGER = -1
_FLASH_ATTENTION = "1"  # a bit of the provider's sdpa_kernel
_DEPTH = 64  # inputs of a layer that the provider's fast products of int8 weights take at once


class Binding(Protocol):
    """Tensors at fixed addresses; whatever they hold when a run executes is what it reads."""


class GraphSession(Protocol):
    """One graph on one device. One thread only: captured CUDA graphs belong to the thread that captured them."""

    def bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        reuse: Binding | None = None,
    ) -> Binding:
        """Contiguous tensors on the device, or on the host for what the graph reads there.

        All that the graph has must be among them; others are left out. `reuse` is a binding of this session that has no
        captured run: it becomes the new one where tensors differ, which takes a tenth of the time.
        """
        ...

    def run(self, binding: Binding, graph: int | None = None) -> None:
        """Enqueue a run on the device's stream and return.

        The first run of a `graph` number executes three times and captures; later ones replay what was captured, with
        the values that host inputs had then. None runs operator by operator.
        """
        ...


class _TensorBinding:
    """Tensors, kept alive, and what a session knows of them."""

    def __init__(self, session: ort.InferenceSession, graph: CudaGraph) -> None:
        self.bound: Any = session.io_binding()
        self._graph = graph
        self._tensors: dict[str, torch.Tensor] = {}

    def hold(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """These from now on; what is bound already and stays is left alone."""
        for name in self._graph.inputs:
            if self._tensors.get(name) is not inputs[name]:
                self.bound.bind_input(name, *_place(inputs[name]))
                self._tensors[name] = inputs[name]
        for name in self._graph.outputs:
            if self._tensors.get(name) is not outputs[name]:
                self.bound.bind_output(name, *_place(outputs[name]))
                self._tensors[name] = outputs[name]


def _place(tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous")
    device = tensor.device
    return device.type, device.index or 0, ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr()


class CudaSession:
    """Implements `GraphSession` on torch's current stream of `device` at the time of construction."""

    def __init__(
        self,
        graph: CudaGraph,
        weights: Mapping[str, torch.Tensor],
        folder: Path,
        device: torch.device,
        register: Callable[[ort.SessionOptions], None] | None = None,
        *,
        captures: bool = False,
        few_shapes: bool = False,
        waits: bool = False,
    ) -> None:
        """`weights` are on the device; `folder` is the artifact's, where the graph says its weights are. `register`
        makes operators of our own known.

        `captures`: runs may have graph numbers. `few_shapes`: what is fast and slow to prepare is worth it, for cuDNN
        plans its attention anew for every shape, in 10 to 1000 ms, and the 8-bit products that win on a few rows lose
        on many. `waits`: for the device, at the end of each run. Some operators, in fp32 among them, leave host memory
        to the run's end; without that it is given back when the session ends, in a callback of the stream that may
        outlive the session and its allocator, and then ends the process (CUDA forbids cudaFreeHost there, error 800).
        """
        self._graph = graph
        self._waits = waits
        self._weights = {weight.name: ort.OrtValue.from_dlpack(weights[weight.name]) for weight in graph.weights}
        self._run_options: dict[int, ort.RunOptions] = {}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # The graph is final as it stands. Fusions would rob MatMulNBits of its fast kernels, and constant folding
        # would read weights from the file.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # A memory plan is kept for every combination of shapes ever seen, and those of prefill and images never end.
        options.enable_mem_pattern = few_shapes
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if few_shapes and _fits_fast_products(graph):
            options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
        for name, weight in self._weights.items():
            options.add_initializer(name, weight)
        if register is not None:
            register(options)
        provider = {
            "device_id": str(device.index or 0),
            "user_compute_stream": str(torch.cuda.current_stream(device).cuda_stream),
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",
            "enable_cuda_graph": str(int(captures)),
        }
        if not few_shapes:
            provider["sdpa_kernel"] = _FLASH_ATTENTION
        providers = [("CUDAExecutionProvider", provider)]
        with operator_errors():
            self._session = ort.InferenceSession(graph.model, options, providers=providers, enable_fallback=0)

    def bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        reuse: Binding | None = None,
    ) -> Binding:
        binding = reuse if reuse is not None else _TensorBinding(self._session, self._graph)
        assert isinstance(binding, _TensorBinding)
        binding.hold(inputs, outputs)
        return binding

    def run(self, binding: Binding, graph: int | None = None) -> None:
        assert isinstance(binding, _TensorBinding)
        with operator_errors():
            self._session.run_with_iobinding(binding.bound, self._options(_EAGER if graph is None else graph))

    def _options(self, graph: int) -> ort.RunOptions:
        if graph not in self._run_options:
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(graph))
            if not self._waits:
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._run_options[graph] = options
        return self._run_options[graph]


def _fits_fast_products(graph: CudaGraph) -> bool:
    """The provider takes them for layers that end within _DEPTH inputs too; on an H100 it then computes NaN."""
    return all(weight.shape[1] * weight.shape[2] % _DEPTH == 0 for weight in graph.weights if weight.form == "blocks")
