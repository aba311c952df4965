"""Models of one domain's nodes, and sessions over them on the CPU provider."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped]
import torch
from onnx import NodeProto, TensorProto, helper
from torch.utils.dlpack import from_dlpack

from engine.kernels.bridge import Operator, register

DOMAIN = "tests"
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}

ort.set_default_logger_severity(4)  # what fails here is meant to


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **parameters: Any) -> NodeProto:
    attribute = {"parameters": json.dumps(parameters)}
    return helper.make_node(operator, inputs, outputs, name or outputs[0], domain=DOMAIN, **attribute)


def model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, torch.dtype],
    outputs: Mapping[str, torch.dtype],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> bytes:
    """Inputs and outputs may have any rank."""
    initializers = []
    for name, weight in (weights or {}).items():
        raw = weight.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        initializers.append(helper.make_tensor(name, ONNX_TYPES[weight.dtype], weight.shape, raw, raw=True))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, ONNX_TYPES[dtype], None) for name, dtype in inputs.items()],
        [helper.make_tensor_value_info(name, ONNX_TYPES[dtype], None) for name, dtype in outputs.items()],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def options_with(operators: Sequence[Operator], folder: Path) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    register(options, DOMAIN, operators, "CPUExecutionProvider", folder)
    return options


def open_session(content: bytes, operators: Sequence[Operator], folder: Path) -> ort.InferenceSession:
    return open_with(content, options_with(operators, folder))


def open_with(content: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def run(session: ort.InferenceSession, **inputs: torch.Tensor) -> list[torch.Tensor]:
    values = {name: ort.OrtValue.from_dlpack(tensor) for name, tensor in inputs.items()}
    return [from_dlpack(value).clone() for value in session.run_with_ort_values(None, values)]
