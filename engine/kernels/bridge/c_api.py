"""The part of ONNX Runtime's C API that an operator needs, through ctypes.

The API is a table of function pointers that only ever grows at its end (onnxruntime_c_api.h, `struct OrtApi`); a
number below is a function's place in it. Functions that can fail return an OrtStatus, null when all is well.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

VERSION = 24  # of the API: the first that has GetTensorElementTypeAndShapeDataReference
FAIL = 1  # OrtErrorCode ORT_FAIL

_CREATE_STATUS, _GET_ERROR_MESSAGE, _RELEASE_STATUS = 0, 2, 93
_CREATE_DOMAIN, _DOMAIN_ADD, _ADD_DOMAIN, _RELEASE_DOMAIN = 26, 27, 28, 101
_GET_DATA, _GET_TYPE_AND_SHAPE = 51, 414
_GET_STRING_ATTRIBUTE, _GET_NODE_NAME, _GET_CONSTANT_INPUT = 87, 244, 249
_GET_INPUT, _GET_OUTPUT = 90, 91

_Address = ctypes.c_void_p
_Index = ctypes.c_size_t
_Function = Callable[..., int | None]


class OrtCustomOp(ctypes.Structure):
    """`struct OrtCustomOp`: what ONNX Runtime asks of an operator. An entry that is null is not asked."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("CreateKernel", _Address),
        ("GetName", _Address),
        ("GetExecutionProviderType", _Address),
        ("GetInputType", _Address),
        ("GetInputTypeCount", _Address),
        ("GetOutputType", _Address),
        ("GetOutputTypeCount", _Address),
        ("KernelCompute", _Address),
        ("KernelDestroy", _Address),
        ("GetInputCharacteristic", _Address),
        ("GetOutputCharacteristic", _Address),
        ("GetInputMemoryType", _Address),
        ("GetVariadicInputMinArity", _Address),
        ("GetVariadicInputHomogeneity", _Address),
        ("GetVariadicOutputMinArity", _Address),
        ("GetVariadicOutputHomogeneity", _Address),
        ("CreateKernelV2", _Address),
        ("KernelComputeV2", _Address),
        ("InferOutputShapeFn", _Address),
        ("GetStartVersion", _Address),
        ("GetEndVersion", _Address),
        ("GetMayInplace", _Address),
        ("ReleaseMayInplace", _Address),
        ("GetAliasMap", _Address),
        ("ReleaseAliasMap", _Address),
    )


class OrtApi:
    """ONNX Runtime's functions, without its statuses: a failure raises RuntimeError with ONNX Runtime's message.

    Calls hold the GIL: they take less than a microsecond, and none waits for another thread's Python code. Addresses
    and handles are ints throughout; 0 is null.
    """

    def __init__(self, base: int) -> None:
        """`base` is the `OrtApiBase` that ONNX Runtime hands to a library of operators."""
        get_api = ctypes.PYFUNCTYPE(_Address, ctypes.c_uint32)(_Address.from_address(base).value or 0)
        self._table = get_api(VERSION)
        if not self._table:
            raise RuntimeError(f"ONNX Runtime offers no version {VERSION} of its C API")
        self._create_status = self._bind(_CREATE_STATUS, ctypes.c_int, ctypes.c_char_p)
        self._release_status = self._bind(_RELEASE_STATUS, _Address)
        self._create_domain = self._bind(_CREATE_DOMAIN, ctypes.c_char_p, _Address)
        self._domain_add = self._bind(_DOMAIN_ADD, _Address, _Address)
        self._add_domain = self._bind(_ADD_DOMAIN, _Address, _Address)
        self._release_domain = self._bind(_RELEASE_DOMAIN, _Address)
        self._get_string = self._bind(_GET_STRING_ATTRIBUTE, _Address, ctypes.c_char_p, _Address, _Address)
        self._get_node_name = self._bind(_GET_NODE_NAME, _Address, _Address, _Address)
        self._get_constant = self._bind(_GET_CONSTANT_INPUT, _Address, _Index, _Address, _Address)
        # What runs for every tensor of every node takes ctypes objects that the caller keeps, and no ints: converting
        # arguments would cost as much again as the call. The caller checks the status.
        self.get_input = self._bind(_GET_INPUT)  # context, index, &value
        self.get_output = self._bind(_GET_OUTPUT)  # context, index, sizes, rank, &value
        self.get_data = self._bind(_GET_DATA)  # value, &address
        self.get_type_and_shape = self._bind(_GET_TYPE_AND_SHAPE)  # value, &type, &sizes, &rank

    def _bind(self, place: int, *arguments: type) -> _Function:
        entry = _Address.from_address(self._table + place * ctypes.sizeof(_Address)).value
        return ctypes.PYFUNCTYPE(_Address, *arguments)(entry or 0)

    def check(self, status: int | None) -> None:
        if status:
            message = ctypes.PYFUNCTYPE(ctypes.c_char_p, _Address)
            entry = _Address.from_address(self._table + _GET_ERROR_MESSAGE * ctypes.sizeof(_Address)).value
            text = message(entry or 0)(status).decode(errors="replace")
            self._release_status(status)
            raise RuntimeError(text)

    def failure(self, message: str) -> int:
        """A status, which belongs to ONNX Runtime once it is returned to it."""
        return self._create_status(FAIL, message.encode(errors="replace")) or 0

    def add_domain(self, options: int, name: str, operators: list[int]) -> int:
        """Add operators (addresses of `OrtCustomOp`) to an OrtSessionOptions; the domain that `release_domain` frees.

        ONNX Runtime copies neither: they must stay until the last session of these options is gone.
        """
        domain = _Address()
        self.check(self._create_domain(name.encode(), ctypes.addressof(domain)))
        assert domain.value
        for operator in operators:
            self.check(self._domain_add(domain.value, operator))
        self.check(self._add_domain(options, domain.value))
        return domain.value

    def release_domain(self, domain: int) -> None:
        self._release_domain(domain)

    def string_attribute(self, info: int, name: str) -> str:
        """Of the node for which a kernel is being created."""
        return self._text(lambda text, size: self._get_string(info, name.encode(), text, size))

    def node_name(self, info: int) -> str:
        return self._text(lambda text, size: self._get_node_name(info, text, size))

    def constant_input(self, info: int, index: int) -> int:
        """The OrtValue of an input that is a weight, the same for the life of the session; 0 for other inputs."""
        found, value = ctypes.c_int(), _Address()
        self.check(self._get_constant(info, index, ctypes.addressof(found), ctypes.addressof(value)))
        return value.value or 0 if found.value else 0

    def _text(self, read: Callable[[int, int], int | None]) -> str:
        size = ctypes.c_size_t()
        self.check(read(0, ctypes.addressof(size)))
        text = ctypes.create_string_buffer(size.value)
        self.check(read(ctypes.addressof(text), ctypes.addressof(size)))
        return text.raw[: size.value - 1].decode()
