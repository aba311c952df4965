"""One of ONNX Runtime's operators on a real device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
import torch
from onnx import helper

from engine.kernels.bridge.tensors import ELEMENT_TYPES
from tests.cuda.operators import MICROSOFT

DEVICE = torch.device("cuda", 0)
Tensors = dict[str, torch.Tensor]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def starts_of(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)


def node(kind: str, inputs: Mapping[str, torch.Tensor | None], outputs: Tensors, **attributes: Any) -> bytes:
    """A model of one operator; None is an input that is left out."""
    names = [name if tensor is not None else "" for name, tensor in inputs.items()]
    one = helper.make_node(kind, names, list(outputs), domain=MICROSOFT, **attributes)
    takes, gives = (
        [
            helper.make_tensor_value_info(name, ELEMENT_TYPES[tensor.dtype], _shape(name, tensor))
            for name, tensor in tensors.items()
            if tensor is not None and tensor.dim()
        ]
        for tensors in (inputs, outputs)
    )
    graph = helper.make_graph([one], "one", takes, gives)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    source: bytes = model.SerializeToString()
    return source


def _shape(name: str, tensor: torch.Tensor) -> list[str | int]:
    """Open but for the last axis, which some operators count heads by."""
    return [*(f"{name}{axis}" for axis in range(tensor.dim() - 1)), tensor.shape[-1] if tensor.dim() > 1 else name]


def run(
    source: bytes, inputs: Mapping[str, torch.Tensor | None], outputs: Tensors, *places: Mapping[str, str]
) -> list[Tensors]:
    """Outputs after a run on the device for each of `places`, which name those that are in an input's memory."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(source, options, providers=["CUDAExecutionProvider"], enable_fallback=0)
    results = []
    for same in places:
        given = {name: tensor.to(DEVICE) for name, tensor in inputs.items() if tensor is not None}
        taken = {name: given[same[name]] if name in same else tensor.to(DEVICE) for name, tensor in outputs.items()}
        torch.cuda.synchronize()
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, given), (binding.bind_output, taken)):
            for name, tensor in tensors.items():
                bind(name, "cuda", 0, ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)
        results.append({name: tensor.cpu() for name, tensor in taken.items()})
    return results
