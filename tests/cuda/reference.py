"""A CUDA session's stand-in: runs a serialised graph with torch on CPU tensors, node by node.

Like the device it writes outputs and caches in place, keeps what the host passed at capture, and replays a graph only
on the memory it was captured with. Unlike the device it checks what it is given, and takes fp32 where the device's
attention does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import onnx
import torch
from numpy.typing import NDArray

import tests.cuda.attention
import tests.cuda.delta_net
import tests.cuda.fused_operators
import tests.cuda.shapes  # noqa: F401  (these four register their operators)
from engine.runtime.cuda.session import Binding
from tests.cuda.operators import MICROSOFT, OPERATORS, Operator, attribute, initializer, torch_dtype
from tests.cuda.paged_attention import PAGED_ATTENTION

# Inputs that the provider reads on the host, by operator: a captured graph keeps what they were.
_HOST_INPUTS = {
    PAGED_ATTENTION: 16,
    (MICROSOFT, "GroupQueryAttention"): 6,
    ("", "Reshape"): 1,
    ("", "Expand"): 1,
    ("", "Tile"): 1,
    ("", "Split"): 1,
}


class ReferenceBinding:
    """Tensors by name; `ReferenceSession.run` reads and writes them where they are."""

    def __init__(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        self.inputs = dict(inputs)
        self.outputs = dict(outputs)

    def places(self) -> dict[str, tuple[object, ...]]:
        """Address, shape and dtype of everything bound."""
        bound = self.inputs | self.outputs
        return {name: (tensor.data_ptr(), tensor.shape, tensor.dtype) for name, tensor in bound.items()}


class _Node(NamedTuple):
    operator: Operator
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


class _Declared(NamedTuple):
    dtype: torch.dtype
    shape: list[int | str] | None  # None: any


class _Capture(NamedTuple):
    places: dict[str, tuple[object, ...]]
    on_host: dict[str, torch.Tensor]


class ReferenceSession:
    """Implements the GraphSession protocol; `runs` lists the graph id of every run, None for an eager one.

    `weights` holds the graph's external data by name, `operators` further operators by (domain, name).
    """

    def __init__(
        self,
        model: bytes,
        weights: Mapping[str, torch.Tensor | NDArray[Any]],
        operators: Mapping[tuple[str, str], Operator] | None = None,
    ) -> None:
        torch.set_num_threads(1)  # tensors are tiny: threads would wait for each other longer than they compute
        self.runs: list[int | None] = []
        graph = onnx.load_model_from_string(model).graph
        self._weights = {tensor.name: initializer(tensor, weights) for tensor in graph.initializer}
        known = OPERATORS | dict(operators or {})
        self._nodes = [_node(node, known) for node in graph.node]
        self._inputs = {value.name: _declared(value) for value in graph.input if value.name not in self._weights}
        self._outputs = {value.name: _declared(value) for value in graph.output}
        self._on_host = {node.input[slot] for node in graph.node for slot in _host_inputs(node)}
        paged = [node for node in graph.node if (node.domain, node.op_type) == PAGED_ATTENTION]
        self._caches = {name for node in paged for name in node.output[1:]}
        self._captured: dict[int, _Capture] = {}

    def bind(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Mapping[str, torch.Tensor],
        reuse: Binding | None = None,
    ) -> ReferenceBinding:
        """Raises ValueError for missing names, and for dtypes and shapes other than the graph declares."""
        inputs = {name: tensor for name, tensor in inputs.items() if name in self._inputs}
        outputs = {name: tensor for name, tensor in outputs.items() if name in self._outputs}
        _check(inputs, self._inputs)
        _check(outputs, self._outputs)
        return ReferenceBinding(inputs, outputs)

    def run(self, binding: Binding, graph: int | None = None) -> None:
        assert isinstance(binding, ReferenceBinding)
        self.runs.append(graph)
        if graph is None:
            self._execute(binding.inputs, binding.outputs)
            return
        if graph not in self._captured:
            on_host = {name: tensor.clone() for name, tensor in binding.inputs.items() if name in self._on_host}
            self._captured[graph] = _Capture(binding.places(), on_host)
            # Capturing runs the graph eagerly first: what it does to memory is done more than once.
            self._execute(binding.inputs, binding.outputs)
        captured = self._captured[graph]
        assert captured.places == binding.places(), f"graph {graph} was captured on other memory"
        self._execute(binding.inputs | captured.on_host, binding.outputs)

    def _execute(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        values: dict[str, torch.Tensor] = self._weights | dict(inputs)
        for node in self._nodes:
            results = node.operator(*(values[name] if name else None for name in node.inputs), **node.attributes)
            parts = [results] if isinstance(results, torch.Tensor) else results
            values.update(
                {name: part for name, part in zip(node.outputs, parts, strict=False) if name and part is not None}
            )
        for name, bound in outputs.items():
            result = values[name]
            if (result.shape, result.dtype) != (bound.shape, bound.dtype):
                raise ValueError(f"{name} is {_describe(result)}, but the memory bound for it is {_describe(bound)}")
            if result.data_ptr() != bound.data_ptr():
                assert name not in self._caches, f"{name} must be bound to its input's memory"
                bound.copy_(result)


def _node(node: onnx.NodeProto, known: Mapping[tuple[str, str], Operator]) -> _Node:
    operator = known.get((node.domain, node.op_type))
    assert operator is not None, f"the reference has no operator {node.domain}:{node.op_type}"
    attributes = {item.name: attribute(item) for item in node.attribute}
    return _Node(operator, list(node.input), list(node.output), attributes)


def _host_inputs(node: onnx.NodeProto) -> list[int]:
    slot = _HOST_INPUTS.get((node.domain, node.op_type))
    return [slot] if slot is not None and slot < len(node.input) and node.input[slot] else []


def _declared(value: onnx.ValueInfoProto) -> _Declared:
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim] if kind.HasField("shape") else None
    return _Declared(torch_dtype(kind.elem_type), shape)


def _check(given: Mapping[str, torch.Tensor], declared: Mapping[str, _Declared]) -> None:
    if given.keys() != declared.keys():
        raise ValueError(f"nothing is bound to {sorted(declared.keys() - given.keys())}")
    for name, tensor in given.items():
        dtype, shape = declared[name]
        if tensor.dtype != dtype or not _fits(tensor, shape):
            raise ValueError(f"{name} is {_describe(tensor)}; the graph takes {dtype} {shape}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")


def _fits(tensor: torch.Tensor, shape: list[int | str] | None) -> bool:
    if shape is None:
        return True
    sizes = zip(shape, tensor.shape, strict=False)
    return len(shape) == tensor.dim() and all(isinstance(want, str) or want == found for want, found in sizes)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
