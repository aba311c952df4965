"""Python operators in real ONNX Runtime sessions: types, shapes, parameters, optional and constant inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph  # type: ignore[import-untyped]

from engine.kernels.bridge import Call, Compute, DeviceTensor, Input, Operator
from tests.kernels.bridge_sessions import ONNX_TYPES, model, node, open_session, open_with, options_with, run

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


def tensor(call: Call, index: int) -> torch.Tensor:
    """On the CPU provider an input is a torch tensor."""
    found = call.input(index)
    assert isinstance(found, torch.Tensor)
    return found


def put(call: Call, index: int, value: torch.Tensor) -> None:
    output = call.output(index, value.shape)
    assert isinstance(output, torch.Tensor)
    assert output.dtype == value.dtype
    output.copy_(value)


def linear(dtype: torch.dtype) -> Operator:
    """y = x @ (weight * scale).T * factor + bias."""

    def open_node(parameters: Mapping[str, Any]) -> Compute:
        factor = float(parameters["factor"])

        def compute(call: Call) -> None:
            x, weight, scale = (tensor(call, index) for index in range(3))
            y = x.float() @ (weight.float() * scale[:, None]).T * factor
            if call.input(3) is not None:
                y = y + tensor(call, 3).float()
            put(call, 0, y.to(dtype))

        return compute

    inputs = (Input(dtype), Input(torch.int8), Input(torch.float32), Input(dtype, optional=True))
    return Operator("Linear", inputs, (dtype,), open_node)


def copy(dtype: torch.dtype) -> Operator:
    return Operator("Copy", (Input(dtype),), (dtype,), lambda _: lambda call: put(call, 0, tensor(call, 0)))


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


WEIGHT = torch.arange(-12, 12, dtype=torch.int8).view(4, 6)
SCALE = torch.tensor([0.5, 1.0, 2.0, 0.25])


def expected(x: torch.Tensor, factor: float, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.float() @ (WEIGHT.float() * SCALE[:, None]).T * factor
    return (y if bias is None else y + bias.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_overloads_of_one_operator_are_told_apart_by_the_type_of_their_inputs(dtype: torch.dtype, folder: Path) -> None:
    nodes = [node("Linear", ["x", "w", "s", "b"], ["y"], factor=3.0)]
    inputs = {"x": dtype, "w": torch.int8, "s": torch.float32, "b": dtype}
    session = open_session(model(nodes, inputs, {"y": dtype}), [linear(each) for each in FLOATS], folder)
    x, bias = numbers(5, 6, dtype=dtype), numbers(4, dtype=dtype, seed=1)
    (y,) = run(session, x=x, w=WEIGHT, s=SCALE, b=bias)
    assert torch.equal(y, expected(x, 3.0, bias))


def test_the_type_of_a_tensor_between_two_nodes_need_not_be_declared(folder: Path) -> None:
    square = torch.eye(6, dtype=torch.int8) * 2
    nodes = [
        node("Linear", ["x", "w", "s"], ["between"], factor=1.0),
        node("Linear", ["between", "w", "s"], ["y"], factor=0.5),
    ]
    weights = {"w": square, "s": torch.ones(6)}
    content = model(nodes, {"x": torch.bfloat16}, {"y": torch.bfloat16}, weights)
    session = open_session(content, [linear(each) for each in FLOATS], folder)
    x = numbers(2, 6, dtype=torch.bfloat16)
    assert torch.equal(run(session, x=x)[0], x * 2)


def test_inputs_of_a_type_that_no_overload_has_are_refused_when_the_session_is_opened(folder: Path) -> None:
    nodes = [node("Linear", ["x", "w", "s"], ["y"], factor=1.0)]
    content = model(nodes, {"x": torch.float32, "w": torch.int8, "s": torch.float32}, {"y": torch.float32})
    with pytest.raises(InvalidGraph, match=r"input parameter \(x\) of operator \(Linear\) in node \(y\) is invalid"):
        open_session(content, [linear(torch.float16), linear(torch.bfloat16)], folder)


@pytest.mark.parametrize("inputs", [["x", "w", "s"], ["x", "w", "s", ""]])
def test_an_optional_input_that_is_left_out_is_none(inputs: list[str], folder: Path) -> None:
    types = {"x": torch.float32, "w": torch.int8, "s": torch.float32}
    content = model([node("Linear", inputs, ["y"], factor=1.0)], types, {"y": torch.float32})
    x = numbers(3, 6)
    (y,) = run(open_session(content, [linear(torch.float32)], folder), x=x, w=WEIGHT, s=SCALE)
    assert torch.equal(y, expected(x, 1.0))


def test_every_node_has_its_own_parameters_and_weights(folder: Path) -> None:
    nodes = [node("Linear", ["x", f"w{i}", "s"], [f"y{i}"], factor=float(i)) for i in range(1, 4)]
    weights = {f"w{i}": WEIGHT + i for i in range(1, 4)} | {"s": SCALE}
    content = model(nodes, {"x": torch.float32}, {f"y{i}": torch.float32 for i in range(1, 4)}, weights)
    session = open_session(content, [linear(torch.float32)], folder)
    for x in (numbers(2, 6), numbers(7, 6, seed=1), numbers(2, 6, seed=2)):
        for i, y in enumerate(run(session, x=x), start=1):
            torch.testing.assert_close(y, x @ ((WEIGHT + i).float() * SCALE[:, None]).T * i)


@pytest.mark.parametrize("dtype", list(ONNX_TYPES))
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 0), (2, 3, 4), (2, 1, 3, 1, 2, 1), (1000, 300)], ids=str)
def test_every_type_and_shape_goes_through_unchanged(dtype: torch.dtype, shape: tuple[int, ...], folder: Path) -> None:
    content = model([node("Copy", ["x"], ["y"])], {"x": dtype}, {"y": dtype})
    session = open_session(content, [copy(dtype)], folder)
    x = (numbers(*shape) * 50).to(dtype)
    (y,) = run(session, x=x)
    assert y.shape == shape
    assert torch.equal(y, x)


def test_a_weight_that_the_session_was_given_is_read_where_it_lies(folder: Path) -> None:
    seen: list[int] = []

    def open_node(_: Mapping[str, Any]) -> Compute:
        def compute(call: Call) -> None:
            seen.append(tensor(call, 1).data_ptr())
            put(call, 0, tensor(call, 0) * tensor(call, 1))

        return compute

    scale = Operator("Scale", (Input(torch.float32), Input(torch.float32)), (torch.float32,), open_node)
    content = model(
        [node("Scale", ["x", "w"], ["y"])], {"x": torch.float32}, {"y": torch.float32}, {"w": torch.ones(4)}
    )
    options, weight = options_with([scale], folder), torch.arange(4.0)
    value = ort.OrtValue.from_dlpack(weight)  # the options do not keep it
    options.add_initializer("w", value)
    session = open_with(content, options)
    assert torch.equal(run(session, x=torch.full((4,), 2.0))[0], weight * 2)
    weight += 1  # shared, not copied
    assert torch.equal(run(session, x=torch.full((4,), 2.0))[0], weight * 2)
    assert seen == [weight.data_ptr()] * 2


def test_an_output_is_written_into_the_tensor_that_is_bound_to_it(folder: Path) -> None:
    session = open_session(
        model([node("Copy", ["x"], ["y"])], {"x": torch.float32}, {"y": torch.float32}), [copy(torch.float32)], folder
    )
    x, y, binding = numbers(3, 4), torch.zeros(3, 4), session.io_binding()
    binding.bind_input("x", "cpu", 0, 1, [3, 4], x.data_ptr())
    binding.bind_output("y", "cpu", 0, 1, [3, 4], y.data_ptr())
    session.run_with_iobinding(binding)
    assert torch.equal(y, x)


def test_a_node_may_have_several_outputs_of_several_types(folder: Path) -> None:
    def open_node(_: Mapping[str, Any]) -> Compute:
        def compute(call: Call) -> None:
            x = tensor(call, 0)
            scale = x.abs().amax(-1) / 127
            put(call, 1, scale)
            put(call, 0, torch.round(x / scale[:, None]).to(torch.int8))

        return compute

    quantise = Operator("Quantise", (Input(torch.float32),), (torch.int8, torch.float32), open_node)
    content = model([node("Quantise", ["x"], ["q", "s"])], {"x": torch.float32}, {"q": torch.int8, "s": torch.float32})
    x = numbers(4, 64)
    q, s = run(open_session(content, [quantise], folder), x=x)
    torch.testing.assert_close(q * s[:, None], x, atol=float(s.max()), rtol=0)


def test_an_input_on_the_host_can_be_read_as_a_torch_tensor(folder: Path) -> None:
    def open_node(_: Mapping[str, Any]) -> Compute:
        return lambda call: put(call, 0, tensor(call, 0)[: int(tensor(call, 1)[0])])

    inputs = (Input(torch.float32), Input(torch.int64, on_host=True))
    take = Operator("Take", inputs, (torch.float32,), open_node)
    content = model([node("Take", ["x", "n"], ["y"])], {"x": torch.float32, "n": torch.int64}, {"y": torch.float32})
    (y,) = run(open_session(content, [take], folder), x=numbers(5, 2), n=torch.tensor([3]))
    assert torch.equal(y, numbers(5, 2)[:3])


def test_other_operators_run_beside_ours(folder: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["double"]), node("Copy", ["double"], ["y"])]
    session = open_session(model(nodes, {"x": torch.float32}, {"y": torch.float32}), [copy(torch.float32)], folder)
    assert torch.equal(run(session, x=numbers(3))[0], numbers(3) * 2)


def test_a_pointer_into_a_device_is_what_a_kernel_launch_takes() -> None:
    pointer = DeviceTensor(4096, (2, 3), torch.bfloat16)
    assert (pointer.data_ptr(), pointer.shape, pointer.dtype) == (4096, (2, 3), torch.bfloat16)


@pytest.mark.parametrize(
    ("inputs", "outputs", "name"),
    [((), (torch.float32,), "A"), ((Input(torch.float32),), (), "A"), ((Input(torch.float32),), (torch.int8,), "")],
)
def test_an_operator_without_inputs_outputs_or_a_name_is_refused(
    inputs: tuple[Input, ...], outputs: tuple[torch.dtype, ...], name: str
) -> None:
    with pytest.raises(ValueError, match="needs a name, inputs and outputs"):
        Operator(name, inputs, outputs, lambda _: lambda _call: None)


def test_a_type_that_onnx_runtime_is_not_asked_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"operator A: torch\.complex64 is none of torch\.float32, "):
        Operator("A", (Input(torch.complex64),), (torch.float32,), lambda _: lambda _call: None)
