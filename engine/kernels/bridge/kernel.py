"""A node in a session: what computes it, and what one execution sees."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial

import torch

from engine.kernels.bridge.c_api import OrtApi
from engine.kernels.bridge.operator import Compute, Operator
from engine.kernels.bridge.tensors import DeviceTensor, host_tensor
from engine.kernels.pointer import Tensor

_MAX_RANK = 16

_Wrap = Callable[[int, tuple[int, ...], torch.dtype], Tensor]


class OrtCall:
    """Implements `Call`. One object serves many executions, one after another: making its buffers takes longer."""

    def __init__(self, api: OrtApi, operator: Operator, weights: Sequence[Tensor | None], on_device: bool) -> None:
        on_provider: _Wrap = DeviceTensor if on_device else host_tensor
        self._api = api
        self._weights = weights
        self._inputs = [
            _Slot(index, item.dtype, host_tensor if item.on_host else on_provider)
            for index, item in enumerate(operator.inputs)
        ]
        self._outputs = [_Slot(index, dtype, on_provider) for index, dtype in enumerate(operator.outputs)]
        self.context = ctypes.c_void_p()  # the OrtKernelContext of the execution under way
        self._value, self._data, self._type = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        self._sizes, self._rank = ctypes.POINTER(ctypes.c_int64)(), ctypes.c_size_t()
        self._to_value, self._to_data = ctypes.byref(self._value), ctypes.byref(self._data)
        self._to_shape = tuple(map(ctypes.byref, (self._type, self._sizes, self._rank)))
        self._wanted, self._wanted_rank = (ctypes.c_int64 * _MAX_RANK)(), ctypes.c_size_t()

    def input(self, index: int) -> Tensor | None:
        weight = self._weights[index]
        if weight is not None:
            return weight
        slot = self._inputs[index]
        if status := self._api.get_input(self.context, slot.index, self._to_value):
            self._api.check(status)
        return self._read(slot) if self._value else None

    def weight(self, index: int, value: int) -> Tensor:
        """What the OrtValue at address `value` holds for an input."""
        self._value.value = value
        return self._read(self._inputs[index])

    def _read(self, slot: _Slot) -> Tensor:
        if status := self._api.get_type_and_shape(self._value, *self._to_shape):
            self._api.check(status)
        rank = self._rank.value
        return self._tensor(slot, tuple(self._sizes[:rank]) if rank else ())

    def output(self, index: int, shape: Sequence[int]) -> Tensor:
        slot = self._outputs[index]
        for axis, size in enumerate(shape):
            self._wanted[axis] = size
        self._wanted_rank.value = len(shape)
        if status := self._api.get_output(self.context, slot.index, self._wanted, self._wanted_rank, self._to_value):
            self._api.check(status)
        return self._tensor(slot, tuple(shape))

    def _tensor(self, slot: _Slot, shape: tuple[int, ...]) -> Tensor:
        if status := self._api.get_data(self._value, self._to_data):
            self._api.check(status)
        return slot.tensor(self._data.value or 0, shape)


class _Slot:
    """An input or output of the node, and the last tensor there: steps of one size find it at the same address."""

    __slots__ = ("_address", "_dtype", "_shape", "_tensor", "_wrap", "index")

    def __init__(self, index: int, dtype: torch.dtype, wrap: _Wrap) -> None:
        self.index = ctypes.c_size_t(index)
        self._dtype, self._wrap = dtype, wrap
        self._address = 0
        self._shape: tuple[int, ...] = ()
        self._tensor: Tensor | None = None

    def tensor(self, address: int, shape: tuple[int, ...]) -> Tensor:
        if self._tensor is None or address != self._address or shape != self._shape:
            self._tensor = self._wrap(address, shape, self._dtype)
            self._address, self._shape = address, shape
        return self._tensor


class Kernel:
    """Created and destroyed with the session. Threads may run it at the same time."""

    def __init__(
        self,
        api: OrtApi,
        operator: Operator,
        name: str,
        compute: Compute,
        weights: Sequence[int],
        on_device: bool,
        close: Callable[[int], None],
    ) -> None:
        """`weights` has for each input the OrtValue that stays the same for the life of the session, or 0."""
        self.api = api
        self.name = name
        self.close = close
        self._compute = compute
        self._weights: list[Tensor | None] = [None] * len(weights)
        self._new_call = partial(OrtCall, api, operator, self._weights, on_device)
        call = self._new_call()
        self._weights[:] = [call.weight(index, value) if value else None for index, value in enumerate(weights)]
        self._idle = [call]

    def run(self, context: int) -> None:
        try:
            call = self._idle.pop()
        except IndexError:  # another thread is running this node too
            call = self._new_call()
        call.context.value = context
        try:
            self._compute(call)
        finally:
            self._idle.append(call)
