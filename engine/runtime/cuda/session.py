"""ONNX Runtime sessions on one CUDA device, and device tensors bound to their inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
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


class Binding(Protocol):
    """Tensors at fixed addresses; whatever they hold when a run executes is what it reads."""


class GraphSession(Protocol):
    """One graph on one device. One thread only: captured CUDA graphs belong to the thread that captured them."""

    def bind(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> Binding:
        """Contiguous tensors on the device, or on the host for what the graph reads there.

        All that the graph has must be among them; others are left out.
        """
        ...

    def run(self, binding: Binding, graph: int | None = None) -> None:
        """Enqueue a run on the device's stream and return.

        The first run of a `graph` number executes three times and captures; later ones replay what was captured, with
        the values that host inputs had then. None runs operator by operator.
        """
        ...


class _TensorBinding:
    """Tensors and, once a session ran on them, what it knows of them."""

    def __init__(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        self._inputs = {name: _place(tensor) for name, tensor in inputs.items()}
        self._outputs = {name: _place(tensor) for name, tensor in outputs.items()}
        self._tensors = [*inputs.values(), *outputs.values()]  # kept alive
        self._bound: dict[ort.InferenceSession, Any] = {}

    def of(self, session: ort.InferenceSession) -> Any:
        if session not in self._bound:
            self._bound[session] = binding = session.io_binding()
            for name, place in self._inputs.items():
                binding.bind_input(name, *place)
            for name, place in self._outputs.items():
                binding.bind_output(name, *place)
        return self._bound[session]


def _place(tensor: torch.Tensor) -> tuple[str, int, int, list[int], int]:
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous")
    device = tensor.device
    return device.type, device.index or 0, ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr()


class CudaSession:
    """Implements `GraphSession` on torch's current stream of `device` at the time of construction.

    Two of ONNX Runtime's sessions share the weights, because what is fast to replay is slow to prepare: cuDNN plans
    its attention anew for every shape, in 10 to 1000 ms, and the 8-bit products that win on a few rows lose on many.
    One session replays captured graphs; the other runs shapes that never come again.
    """

    def __init__(
        self,
        graph: CudaGraph,
        weights: Mapping[str, torch.Tensor],
        folder: Path,
        device: torch.device,
        register: Callable[[ort.SessionOptions], None] | None = None,
    ) -> None:
        """`weights` are on the device; `folder` is the artifact's, where the graph says its weights are. `register`
        makes operators of our own known.
        """
        self._register = register
        self._graph = graph
        self._folder = folder
        self._provider = {
            "device_id": str(device.index or 0),
            "user_compute_stream": str(torch.cuda.current_stream(device).cuda_stream),
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",
        }
        self._weights = {weight.name: ort.OrtValue.from_dlpack(weights[weight.name]) for weight in graph.weights}
        self._run_options: dict[int, ort.RunOptions] = {}

    def bind(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> Binding:
        graph = self._graph
        return _TensorBinding(
            {name: inputs[name] for name in graph.inputs}, {name: outputs[name] for name in graph.outputs}
        )

    def run(self, binding: Binding, graph: int | None = None) -> None:
        assert isinstance(binding, _TensorBinding)
        session = self._eager if graph is None else self._replaying
        with operator_errors():
            session.run_with_iobinding(binding.of(session), self._options(_EAGER if graph is None else graph))

    @cached_property
    def _eager(self) -> ort.InferenceSession:
        # A memory plan is kept for every combination of shapes ever seen, and those of prefill and images never end.
        return self._open({"sdpa_kernel": _FLASH_ATTENTION}, {}, plan_memory=False)

    @cached_property
    def _replaying(self) -> ort.InferenceSession:
        return self._open({"enable_cuda_graph": "1"}, {"ep.cuda.fpa_intb_gemm": "1"}, plan_memory=True)

    def _open(self, provider: dict[str, str], config: dict[str, str], *, plan_memory: bool) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # The graph is final as it stands. Fusions would rob MatMulNBits of its fast kernels, and constant folding
        # would read weights from the file.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_pattern = plan_memory
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        for name, weight in self._weights.items():
            options.add_initializer(name, weight)
        if self._register is not None:
            self._register(options)
        providers = [("CUDAExecutionProvider", self._provider | provider)]
        with operator_errors():
            return ort.InferenceSession(self._graph.model, options, providers=providers, enable_fallback=0)

    def _options(self, graph: int) -> ort.RunOptions:
        if graph not in self._run_options:
            options = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(graph))
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            self._run_options[graph] = options
        return self._run_options[graph]
