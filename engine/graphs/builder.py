"""A graph under construction: operators, constants, and weights that stay in the artifact's file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from engine.checkpoints.artifact import Artifact

OPSET = 23
MICROSOFT = "com.microsoft"
TESSERA = "tessera"  # our own operators
_IR_VERSION = 11

Attribute = int | float | str | Sequence[int] | ir.Graph
Build = Callable[[], Sequence[ir.Value]]
Dimension = int | str


class GraphBuilder:
    """Collects one graph; `serialise` gives the model as bytes, without the weights.

    Weights are external data of the artifact's file: a session that is told the artifact's folder maps them.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._tape = Tape()
        self._nodes = self._tape  # a branch's own while it is built; constants are always the graph's
        self._branches = 0
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[Dimension]) -> ir.Value:
        value = ir.val(name, dtype=ir.DataType.from_numpy(np.dtype(dtype)), shape=shape)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: type[np.generic]) -> None:
        value.name = name
        value.dtype = ir.DataType.from_numpy(np.dtype(dtype))
        self._outputs.append(value)

    def constant(self, value: Any, dtype: type[np.generic]) -> ir.Value:
        """A small constant, stored once however often it is asked for."""
        array = np.asarray(value, dtype=dtype)
        return self._initializer(f"constant.{array.dtype}.{array.tolist()}", ir.tensor(array))

    def table(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """A larger constant that is not part of the artifact."""
        return self._initializer(name, ir.tensor(array))

    def weight(self, name: str) -> ir.Value:
        """A tensor of the artifact."""
        entry = self._artifact.entries[name]
        tensor = ir.ExternalTensor(
            location=self._artifact.weights_path.name,
            offset=entry.offset,
            length=entry.nbytes,
            dtype=ir.DataType.from_numpy(np.dtype(entry.dtype)),
            shape=ir.Shape(entry.shape),
            name=name,
            base_dir=str(self._artifact.folder),
        )
        return self._initializer(name, tensor)

    def has(self, name: str) -> bool:
        """Whether the artifact has a tensor of that name."""
        return name in self._artifact.entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of the artifact."""
        return self._artifact.entries[name].shape

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._initializers:
            self._initializers[name] = self._tape.initializer(tensor, name=name)
        return self._initializers[name]

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute) -> ir.Value:
        """One node with one output."""
        return self._nodes.op(kind, inputs, attributes, domain=domain)

    def ops(
        self, kind: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """One node with several outputs."""
        return self._nodes.op_multi_out(kind, inputs, attributes, num_outputs=outputs, domain=domain)

    def choose(self, condition: ir.Value, then: Build, otherwise: Build, dtype: type[np.generic]) -> Sequence[ir.Value]:
        """What one of two builders' nodes give at run time, all of `dtype`; both may use everything built so far.

        What an output is bound to, the chosen nodes write to.
        """
        self._branches += 1
        chosen, other = (
            self._branch(build, f"{name}.{self._branches}", dtype)
            for name, build in (("then", then), ("else", otherwise))
        )
        outputs = len(chosen.outputs)
        return self.ops("If", condition, outputs=outputs, then_branch=chosen, else_branch=other)

    def _branch(self, build: Build, name: str, dtype: type[np.generic]) -> ir.Graph:
        outer, self._nodes = self._nodes, Tape()
        try:
            outputs = build()
            nodes = self._nodes.nodes
        finally:
            self._nodes = outer
        # Left to themselves names are given graph by graph, and a branch's would hide those around it.
        for number, value in enumerate(value for node in nodes for value in node.outputs):
            value.name = f"{name}.{number}"
        for value in outputs:
            value.dtype = ir.DataType.from_numpy(np.dtype(dtype))
        return ir.Graph([], outputs, nodes=nodes, name=name)

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self.op("Reshape", value, self.constant(shape, np.int64))

    def columns(self, value: ir.Value, start: int, stop: int) -> ir.Value:
        """[rows, start to stop] of [rows, columns]."""
        return self.op("Slice", value, *(self.constant([place], np.int64) for place in (start, stop, 1)))

    def names(self) -> tuple[frozenset[str], frozenset[str]]:
        """Of inputs and outputs."""
        inputs, outputs = (frozenset(str(value.name) for value in values) for values in (self._inputs, self._outputs))
        return inputs, outputs

    def serialise(self) -> bytes:
        nodes = self._tape.nodes
        own = {TESSERA: 1} if any(node.domain == TESSERA for node in nodes) else {}
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET, MICROSOFT: 1} | own,
            name="model",
        )
        for node in reversed(nodes):  # what nobody reads
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                graph.remove(node, safe=True)
        model: bytes = ir.to_proto(ir.Model(graph, ir_version=_IR_VERSION)).SerializeToString()
        return model
