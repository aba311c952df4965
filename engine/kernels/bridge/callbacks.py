"""The functions that ONNX Runtime calls. One set serves all operators and is never freed.

Never: a session in a global variable is destroyed after the modules whose functions its destruction calls.

Nothing may be raised into C. What answers a question about an operator cannot fail; what runs an operator's own code
returns a status instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from engine.kernels.bridge.c_api import OrtApi
from engine.kernels.bridge.failures import keep
from engine.kernels.bridge.tensors import ELEMENT_TYPES

if TYPE_CHECKING:
    from engine.kernels.bridge.domain import Domain, Entry
    from engine.kernels.bridge.kernel import Kernel

_DEFAULT_MEMORY, _HOST_MEMORY = 0, -2  # OrtMemTypeDefault, OrtMemTypeCPUInput
_REQUIRED, _OPTIONAL = 0, 1  # OrtCustomOpInputOutputCharacteristic

_Address, _Index, _Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

entries: dict[int, Entry] = {}  # by the address of the operator's struct
nodes: dict[int, Kernel] = {}  # by what ONNX Runtime takes for a pointer to the kernel

_load_api = cache(OrtApi)  # there is one ONNX Runtime in a process
_thread = threading.local()


@contextlib.contextmanager
def registering(domain: Domain) -> Iterator[None]:
    """ONNX Runtime calls back on the same thread, without saying for whom."""
    _thread.domain = domain
    try:
        yield
    finally:
        del _thread.domain


def _register(options: int, base: int) -> int:
    api = _load_api(base)
    try:
        _thread.domain.add_to(options, api)
    except BaseException as error:  # noqa: BLE001
        return api.failure(keep(error, "registering operators"))
    return 0


def _create_kernel(operator: int, _api: int, info: int, created: int) -> int:
    entry = entries[operator]
    try:
        _Address.from_address(created).value = entry.open(info)
    except BaseException as error:  # noqa: BLE001
        domain = entry.domain
        return domain.api.failure(keep(error, domain.describe(entry.operator, info)))
    return 0


def _compute(node: int, context: int) -> int:
    kernel = nodes[node]
    try:
        kernel.run(context)
    except BaseException as error:  # noqa: BLE001
        return kernel.api.failure(keep(error, kernel.name))
    return 0


def _destroy(node: int | None) -> None:
    kernel = nodes.pop(node, None) if node else None
    if node and kernel is not None:
        kernel.close(node)


def _input_characteristic(operator: int, index: int) -> int:
    return _OPTIONAL if entries[operator].operator.inputs[index].optional else _REQUIRED


def _input_memory(operator: int, index: int) -> int:
    return _HOST_MEMORY if entries[operator].operator.inputs[index].on_host else _DEFAULT_MEMORY


def _immortal(function: Callable[..., Any], result: Any, *arguments: Any) -> int:
    """The address of a C function that calls `function`."""
    thunk = ctypes.CFUNCTYPE(result, *arguments)(function)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thunk))
    return ctypes.cast(thunk, _Address).value or 0


REGISTER = _immortal(_register, _Address, _Address, _Address)

STRUCT = {
    "GetName": _immortal(lambda op: ctypes.addressof(entries[op].name), _Address, _Address),
    "GetExecutionProviderType": _immortal(lambda op: ctypes.addressof(entries[op].provider), _Address, _Address),
    "GetInputTypeCount": _immortal(lambda op: len(entries[op].operator.inputs), _Index, _Address),
    "GetInputType": _immortal(
        lambda op, i: ELEMENT_TYPES[entries[op].operator.inputs[i].dtype], _Int, _Address, _Index
    ),
    "GetInputCharacteristic": _immortal(_input_characteristic, _Int, _Address, _Index),
    "GetInputMemoryType": _immortal(_input_memory, _Int, _Address, _Index),
    "GetOutputTypeCount": _immortal(lambda op: len(entries[op].operator.outputs), _Index, _Address),
    "GetOutputType": _immortal(lambda op, i: ELEMENT_TYPES[entries[op].operator.outputs[i]], _Int, _Address, _Index),
    "GetOutputCharacteristic": _immortal(lambda _op, _i: _REQUIRED, _Int, _Address, _Index),
    "CreateKernelV2": _immortal(_create_kernel, _Address, _Address, _Address, _Address, _Address),
    "KernelComputeV2": _immortal(_compute, _Address, _Address, _Address),
    "KernelDestroy": _immortal(_destroy, None, _Address),
}
