"""Domains of Python operators in ONNX Runtime's sessions: what it calls, and for how long all of that must stay.

ONNX Runtime keeps bare pointers to an operator's struct for as long as a session may create or run a node of it. It
says when a node goes (`KernelDestroy`), and a session's options are seen to go, so a domain is freed when both have
happened. The functions that it calls are the same for every operator (callbacks.py) and are never freed.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnxruntime as ort  # type: ignore[import-untyped]

from engine.errors import KernelsUnavailable
from engine.kernels.bridge import callbacks
from engine.kernels.bridge.c_api import VERSION, OrtApi, OrtCustomOp
from engine.kernels.bridge.failures import operator_errors
from engine.kernels.bridge.kernel import Kernel
from engine.kernels.bridge.operator import Operator
from engine.kernels.bridge.shim import open_shim

Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider"]

_numbers = itertools.count(1)


def register(
    options: ort.SessionOptions, domain: str, operators: Sequence[Operator], provider: Provider, folder: Path
) -> None:
    """Make the nodes of `domain` known to sessions of these `options`, where they run on `provider`.

    A model imports the domain in version 1. `folder` is where a library of some kilobytes is kept. Raises
    KernelsUnavailable if Python operators cannot be used here.
    """
    path, library = open_shim(folder)
    ctypes.c_void_p.in_dll(library, "forward").value = callbacks.REGISTER
    added = Domain(domain, operators, provider)
    with operator_errors(), callbacks.registering(added):
        options.register_custom_ops_library(str(path))
    if not added.is_registered:
        raise KernelsUnavailable(f"{path} was replaced while it was being loaded; try again")
    weakref.finalize(options, added.retire).atexit = False


class Domain:
    """Operators of one `SessionOptions`, and the nodes of the sessions opened with it."""

    def __init__(self, name: str, operators: Sequence[Operator], provider: Provider) -> None:
        self._name = name
        self._entries = [Entry(self, operator, provider) for operator in operators]
        self._handles: list[int] = []  # of one OrtCustomOpDomain, until it is freed
        self._nodes: set[int] = set()
        self._options_gone = False

    @property
    def is_registered(self) -> bool:
        return bool(self._handles)

    def add_to(self, options: int, api: OrtApi) -> None:
        """`options` is an OrtSessionOptions."""
        self.api = api
        for entry in self._entries:
            callbacks.entries[entry.address] = entry
        self._handles.append(api.add_domain(options, self._name, [entry.address for entry in self._entries]))

    def open_node(self, operator: Operator, info: int, on_device: bool) -> int:
        """The node that `info` (an OrtKernelInfo) describes, as what ONNX Runtime takes for a pointer to its kernel."""
        api = self.api
        compute = operator.open(_parameters(api, info))
        weights = [api.constant_input(info, index) for index in range(len(operator.inputs))]
        kernel = Kernel(api, operator, self.describe(operator, info), compute, weights, on_device, self.close_node)
        number = next(_numbers)
        self._nodes.add(number)
        callbacks.nodes[number] = kernel
        return number

    def close_node(self, number: int) -> None:
        self._nodes.discard(number)
        self._free_if_unused()

    def describe(self, operator: Operator, info: int) -> str:
        return f"{self._name}.{operator.name} {self.api.node_name(info)!r}"

    def retire(self) -> None:
        """No more sessions will be opened; some may still be open."""
        self._options_gone = True
        self._free_if_unused()

    def _free_if_unused(self) -> None:
        if not self._options_gone or self._nodes:
            return
        try:
            handle = self._handles.pop()
        except IndexError:  # another thread closed the other last node at the same moment
            return
        for entry in self._entries:
            callbacks.entries.pop(entry.address, None)
        self._entries.clear()
        self.api.release_domain(handle)


class Entry:
    """One operator as ONNX Runtime knows it: the address of a struct, and what it asks about that."""

    def __init__(self, domain: Domain, operator: Operator, provider: Provider) -> None:
        self.domain: Domain = domain
        self.operator: Operator = operator
        self.name: ctypes.Array[ctypes.c_char] = ctypes.create_string_buffer(operator.name.encode())
        self.provider: ctypes.Array[ctypes.c_char] = ctypes.create_string_buffer(provider.encode())
        self._struct = OrtCustomOp(version=VERSION, **callbacks.STRUCT)
        self.address = ctypes.addressof(self._struct)

    def open(self, info: int) -> int:
        on_device = self.provider.value == b"CUDAExecutionProvider"
        return self.domain.open_node(self.operator, info, on_device)


def _parameters(api: OrtApi, info: int) -> dict[str, Any]:
    try:
        text = api.string_attribute(info, "parameters")
    except RuntimeError as error:
        raise ValueError("the node has no string attribute 'parameters'") from error
    parameters = json.loads(text)
    if not isinstance(parameters, dict):
        raise ValueError(f"the attribute 'parameters' is {text[:100]!r}; it must be a JSON object")
    return parameters
