"""What a session's binding holds, with ONNX Runtime's CPU provider."""

from __future__ import annotations

import onnxruntime as ort  # type: ignore[import-untyped]
import torch
from onnx import TensorProto, helper

from engine.graphs.cuda import CudaGraph
from engine.runtime.cuda.session import _TensorBinding


def sums() -> tuple[ort.InferenceSession, CudaGraph]:
    """y = a + b."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "aby"]
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "sum", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session, CudaGraph(model, (), frozenset("ab"), frozenset("y"))


def test_a_binding_takes_other_tensors_of_other_shapes_and_keeps_the_rest() -> None:
    session, names = sums()
    binding = _TensorBinding(session, names)
    fixed = torch.full((1,), 10.0)
    for size in (3, 1, 5):
        a, y = torch.arange(float(size)), torch.zeros(size)
        binding.hold({"a": a, "b": fixed, "unknown": a}, {"y": y})
        session.run_with_iobinding(binding.bound)
        assert y.tolist() == [10.0 + place for place in range(size)]


def test_what_was_replaced_is_let_go() -> None:
    session, names = sums()
    binding = _TensorBinding(session, names)
    first, b, y = torch.ones(2), torch.ones(2), torch.zeros(2)
    binding.hold({"a": first, "b": b}, {"y": y})
    binding.hold({"a": b, "b": b}, {"y": y})
    first.fill_(50.0)
    session.run_with_iobinding(binding.bound)
    assert y.tolist() == [2.0, 2.0]
    assert not any(tensor is first for tensor in binding._tensors.values())
