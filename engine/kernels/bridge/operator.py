"""What an operator declares, and what its computation sees of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.kernels.bridge.tensors import ELEMENT_TYPES
from engine.kernels.pointer import Tensor


class Call(Protocol):
    """One execution of a node. Its tensors are ONNX Runtime's memory, valid until the computation returns.

    A torch tensor where the memory is the host's, else a `DeviceTensor`; kernels can be launched on both.
    """

    def input(self, index: int) -> Tensor | None:
        """None for an optional input that the node leaves out."""
        ...

    def output(self, index: int, shape: Sequence[int]) -> Tensor:
        """Memory that ONNX Runtime allocates, uninitialised, or the tensor that is bound to the graph's output."""
        ...


Compute = Callable[[Call], None]


@dataclass(frozen=True, slots=True)
class Input:
    """`on_host`: ONNX Runtime keeps this input in host memory, also for nodes on a GPU."""

    dtype: torch.dtype
    optional: bool = False
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class Operator:
    """A node type. Operators of one name that differ only in dtypes are overloads: ONNX Runtime picks by the inputs.

    `open` is called once for each node when a session is created, with the object that the node's string attribute
    `parameters` holds as JSON, and returns what computes that node; it raises if the parameters make no sense. On a
    GPU a computation launches on torch's current stream, which must be the stream that the session was given.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[torch.dtype, ...]
    open: Callable[[Mapping[str, Any]], Compute]

    def __post_init__(self) -> None:
        if not self.name or not self.inputs or not self.outputs:
            raise ValueError(f"an operator needs a name, inputs and outputs: {self}")
        for dtype in (*(item.dtype for item in self.inputs), *self.outputs):
            if dtype not in ELEMENT_TYPES:
                raise ValueError(f"operator {self.name}: {dtype} is none of {', '.join(map(str, ELEMENT_TYPES))}")
