"""Weights as a CUDA graph wants them, and a builder that asks for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from engine.checkpoints.artifact import Artifact
from engine.graphs.builder import GraphBuilder
from engine.spec import FloatType

BLOCK = 32  # weights per scale of MatMulNBits; its fast kernels know no other block

Form = Literal["plain", "float32", "stored", "blocks", "block_scales"]
"""plain: the artifact's values as `dtype`, int8 ones times their scale. float32: the same in that type.
stored: as they lie there. blocks: int8 [out, in] as uint8 [out, in / BLOCK, BLOCK] around 128. block_scales: one scale
per output channel, repeated for each block, [out, in / BLOCK]."""


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """An initializer `name` that the runtime puts on the device: rows of the artifact's tensor `source` in a form."""

    name: str
    source: str
    rows: tuple[int, int]
    form: Form
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CudaGraph:
    """A serialised model, the weights it must be given to open a session, and the names of its inputs and outputs."""

    model: bytes
    weights: tuple[DeviceWeight, ...]
    inputs: frozenset[str]
    outputs: frozenset[str]


def numpy_type(activations: FloatType) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if activations == "bfloat16" else activations)


class CudaBuilder(GraphBuilder):
    """Declares weights instead of embedding them: they live once on the device, whichever graphs use them.

    ONNX Runtime accepts a weight from outside only for an initializer whose data is external, and looks whether the
    place exists. So each is declared at the start of the artifact's file, from where nothing is read.
    """

    def __init__(self, artifact: Artifact, activations: FloatType) -> None:
        """`activations` is also the type of weights that are not int8."""
        super().__init__(artifact)
        self.dtype = numpy_type(activations)
        self._declared: dict[str, DeviceWeight] = {}

    def device_weight(
        self, source: str, *, form: Form = "plain", rows: tuple[int, int] | None = None, columns: int = 0
    ) -> ir.Value:
        """`columns` is the number of inputs where the source, a vector of scales, does not tell."""
        entry = self._artifact.entries[source]
        shape = entry.shape
        first, stop = rows or (0, shape[0])
        name = source if form == "plain" and rows is None else f"{source}.{form}.{first}.{stop}"
        dtype = self.dtype
        match form:
            case "plain":
                wanted = (stop - first, *shape[1:])
            case "float32":
                dtype = np.dtype(np.float32)
                wanted = (stop - first, *shape[1:])
            case "stored":
                dtype = np.dtype(entry.dtype)
                wanted = (stop - first, *shape[1:])
            case "blocks":
                dtype = np.dtype(np.uint8)
                wanted = (stop - first, shape[1] // BLOCK, BLOCK)
            case "block_scales":
                wanted = (stop - first, columns // BLOCK)
        self._declared[name] = DeviceWeight(name, source, (first, stop), form, dtype, wanted)
        return self._initializer(name, self._declaration(name, dtype, wanted))

    @property
    def onnx_type(self) -> int:
        """`dtype` as Cast wants it."""
        return int(ir.DataType.from_numpy(self.dtype))

    def _declaration(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            location=self._artifact.weights_path.name,
            offset=0,
            length=math.prod(shape) * dtype.itemsize,
            dtype=ir.DataType.from_numpy(dtype),
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(self._artifact.folder),
        )

    def graph(self) -> CudaGraph:
        return CudaGraph(self.serialise(), tuple(self._declared.values()), *self.names())
