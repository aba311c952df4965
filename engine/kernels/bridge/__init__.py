"""ONNX Runtime operators written in Python, so that a graph's nodes launch our kernels.

An `Operator` is declared with its types and a function that computes; `register` makes a domain of them known to the
sessions that are opened with an `onnxruntime.SessionOptions`. ONNX Runtime plans memory, binds inputs and outputs and
captures CUDA graphs as for its own operators; a replayed graph does not call Python at all.
"""

from __future__ import annotations

from engine.kernels.bridge.domain import register
from engine.kernels.bridge.failures import operator_errors
from engine.kernels.bridge.operator import Call, Compute, Input, Operator
from engine.kernels.bridge.shim import unavailable
from engine.kernels.bridge.tensors import DeviceTensor

__all__ = [
    "Call",
    "Compute",
    "DeviceTensor",
    "Input",
    "Operator",
    "operator_errors",
    "register",
    "unavailable",
]
