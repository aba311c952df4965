"""Python operators on the CUDA provider: kernels launched eagerly, in a captured graph, and what they raise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch
import triton
import triton.language as tl

from engine.kernels.bridge import Call, Compute, DeviceTensor, Input, Operator, operator_errors, register
from tests.kernels.bridge_sessions import DOMAIN, ONNX_TYPES, model, node

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
COLUMNS = 256


@triton.jit  # type: ignore[untyped-decorator]
def scale_columns(x: tl.tensor, weight: tl.tensor, y: tl.tensor, factor: tl.tensor, COLUMNS: tl.constexpr) -> None:
    columns = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * COLUMNS
    value = tl.load(x + row + columns) * tl.load(weight + columns) * factor
    tl.store(y + row + columns, value.to(y.dtype.element_ty))


@pytest.fixture
def stream() -> Iterator[torch.cuda.Stream]:
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        yield torch.cuda.current_stream()


def scale(dtype: torch.dtype, calls: list[tuple[int, ...]]) -> Operator:
    def open_node(parameters: Mapping[str, Any]) -> Compute:
        def compute(call: Call) -> None:
            x, weight, limit = (call.input(index) for index in range(3))
            assert isinstance(x, DeviceTensor)
            assert isinstance(limit, torch.Tensor)
            calls.append(x.shape)
            if x.shape[0] > int(limit[0]):
                raise ValueError(f"{x.shape[0]} rows are too many")
            y = call.output(0, x.shape)
            scale_columns[(x.shape[0],)](x, weight, y, parameters["factor"], COLUMNS)

        return compute

    inputs = (Input(dtype), Input(torch.float32), Input(torch.int32, on_host=True))
    return Operator("Scale", inputs, (dtype,), open_node)


def open_on_gpu(
    dtype: torch.dtype, calls: list[tuple[int, ...]], stream: torch.cuda.Stream, folder: Path
) -> ort.InferenceSession:
    nodes = [node("Scale", ["x", "w", "n"], ["t"], factor=2.0), node("Scale", ["t", "w", "n"], ["y"], factor=0.5)]
    content = model(nodes, {"x": dtype, "n": torch.int32}, {"y": dtype}, {"w": torch.arange(COLUMNS) / COLUMNS})
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    overloads = [scale(torch.float16, calls), scale(torch.bfloat16, calls)]
    register(options, DOMAIN, overloads, "CUDAExecutionProvider", folder)
    provider = {"user_compute_stream": str(stream.cuda_stream), "enable_cuda_graph": "1"}
    return ort.InferenceSession(content, options, providers=[("CUDAExecutionProvider", provider)], enable_fallback=0)


def run(session: ort.InferenceSession, x: torch.Tensor, y: torch.Tensor, rows: int, graph: int) -> None:
    limit, binding, options = torch.tensor([rows], dtype=torch.int32), session.io_binding(), ort.RunOptions()
    for name, value in (("x", x), ("n", limit)):
        place = (value.device.type, value.device.index or 0, ONNX_TYPES[value.dtype], list(value.shape))
        binding.bind_input(name, *place, value.data_ptr())
    binding.bind_output("y", "cuda", y.device.index or 0, ONNX_TYPES[y.dtype], list(y.shape), y.data_ptr())
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    session.run_with_iobinding(binding, options)
    torch.cuda.current_stream().synchronize()


def expected(x: torch.Tensor) -> torch.Tensor:
    weight = torch.arange(COLUMNS, device=CUDA) / COLUMNS
    return ((x * weight * 2).to(x.dtype) * weight * 0.5).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_captured_graph_computes_without_calling_python(
    dtype: torch.dtype, stream: torch.cuda.Stream, tmp_path: Path
) -> None:
    calls: list[tuple[int, ...]] = []
    session = open_on_gpu(dtype, calls, stream, tmp_path)
    x, y = torch.randn(4, COLUMNS, device=CUDA).to(dtype), torch.empty(4, COLUMNS, dtype=dtype, device=CUDA)
    run(session, x, y, 8, graph=1)
    captured = len(calls)
    for _ in range(3):
        x.copy_(torch.randn(4, COLUMNS, device=CUDA))
        run(session, x, y, 8, graph=1)
        assert torch.equal(y, expected(x))
    assert captured
    assert len(calls) == captured


def test_an_exception_on_the_gpu_leaves_the_session_usable(stream: torch.cuda.Stream, tmp_path: Path) -> None:
    session = open_on_gpu(torch.float16, [], stream, tmp_path)
    for rows in (1, 5, 3):
        x = torch.randn(rows, COLUMNS, device=CUDA).half()
        y = torch.empty_like(x)
        for graph in (-1, rows):  # eagerly, and where a graph would have been captured
            with pytest.raises(ValueError, match=f"^{rows} rows are too many$"), operator_errors():
                run(session, x, y, rows - 1, graph)
            run(session, x, y, rows, -1)
            assert torch.equal(y, expected(x))
