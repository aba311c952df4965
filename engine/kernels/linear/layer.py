"""A linear layer over int8 weights: which kernels a call takes, and their launches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton

from engine.kernels.launcher import Launcher
from engine.kernels.linear.gemm import gemm
from engine.kernels.linear.gemv import gemv
from engine.kernels.norm import normalise_rows, quantise_rows
from engine.kernels.pointer import Tensor, Tiled
from engine.kernels.tiles import MOST_ROWS, GemmTile, Kernel, Tiles
from engine.kernels.workspace import TICKETS, Workspace, bytes_of

Norm = Literal["none", "rms", "layer"]
Activation = Literal["none", "silu_gate", "gelu", "gelu_tanh", "quick_gelu"]
Path = Literal["auto", "int8", "float"]
ROW_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LinearParameters:
    """y = activation(norm(x) @ (weight * scale).T + bias) + residual; silu_gate: silu(gate) * up of the rows gate, up.

    path: `int8` quantises each row of activations, `float` does not, for layers whose rows have outliers; `auto` does
    not where a call has so few rows that it would gain nothing.
    """

    epsilon: float = 0.0
    norm: Norm = "none"
    activation: Activation = "none"
    path: Path = "auto"

    @property
    def gate(self) -> bool:
        return self.activation == "silu_gate"


class Call(NamedTuple):
    """The tensors of a call, for the kernels. A: float16 or bfloat16."""

    x: Tensor  # A [rows, K]
    weight: Tensor  # int8 [N, K]
    scale: Tensor  # float32 [N]
    bias: Tensor | None  # A [N]
    norm_weight: Tensor | None  # A [K]
    norm_bias: Tensor | None  # A [K]
    residual: Tensor | None  # A [rows, WIDTH]
    y: Tensor  # A [rows, WIDTH]; WIDTH is N, or N / 2 with silu_gate


class Plan(NamedTuple):
    """A launch but for its tensors; parts: 32-bit words that the programs of split tiles leave to each other; bulk: the
    tile whose operands the copy engine brings.
    """

    kernel: Kernel
    width: int
    grid: tuple[int, int, int]
    constants: tuple[Hashable, ...]
    options: tuple[tuple[str, int], ...]
    parts: int
    bulk: GemmTile | None = None


class Int8Linear:
    """Launches a layer's kernels on the current stream of the current device; nothing waits for them.

    A row's result does not depend on its neighbours, and on their number only as far as that chooses the kernel and its
    tile. All tensors are row-major, without gaps. For one device: kernels found for one are launched again.
    """

    def __init__(self, parameters: LinearParameters, workspace: Workspace, tiles: Tiles) -> None:
        self.parameters = parameters
        self._workspace, self._tiles = workspace, tiles
        self._gemv, self._gemm = Launcher(gemv), Launcher(gemm)
        self._checked = False

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        y: Tensor,
    ) -> None:
        """Write y A[rows, WIDTH]. Shapes and types as in `Call`; but for the number of rows they are always the same.

        Raises ValueError with the first call where they do not fit, with any where y does not; DeviceOutOfMemory if the
        workspace is smaller than `workspace_bytes` says.
        """
        call = Call(x, weight, scale, bias, norm_weight, norm_bias, residual, y)
        if not self._checked:
            check(self.parameters, call)
            self._checked = True
        (rows, k), n = x.shape, weight.shape[0]
        plan = plan_of(self.parameters, self._tiles, rows, n, k)
        if tuple(y.shape) != (rows, plan.width):
            raise ValueError(f"y is {_named(y)}; for x {_named(x)} it must be [{rows}, {plan.width}]")
        if not rows:
            return
        if plan.kernel == "gemv":
            self._gemv(plan.grid, call, (rows,), plan.constants, plan.options)
            return
        with self._workspace.scope():
            values, row_scale = self._quantised(call) if plan.kernel == "int8" else (self._normalised(call), None)
            parts = tickets = None
            if plan.parts:
                sums = torch.float32 if row_scale is None else torch.int32
                parts, tickets = self._workspace.take((plan.parts,), sums), self._workspace.tickets
            operands = (values, weight) if plan.bulk is None else _tiled(values, weight, plan.bulk)
            pointers = (operands[0], row_scale, operands[1], scale, bias, residual, y, parts, tickets)
            self._gemm(plan.grid, pointers, (rows,), plan.constants, plan.options)

    @staticmethod
    def workspace_bytes(parameters: LinearParameters, tiles: Tiles, rows: int, n: int, k: int) -> int:
        """What a call of a weight [n, k] with up to `rows` rows takes of the workspace at most."""
        return max(_bytes_of_call(parameters, tiles, count, n, k) for count in _largest_of_buckets(rows))

    def _quantised(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        rows, k = call.x.shape
        values = self._workspace.take((rows, k), torch.int8)
        scales = self._workspace.take((rows,), torch.float32)
        norm, epsilon = self.parameters.norm, self.parameters.epsilon
        quantise_rows(
            call.x, values, scales, norm=norm, norm_weight=call.norm_weight, norm_bias=call.norm_bias, epsilon=epsilon
        )
        return values, scales

    def _normalised(self, call: Call) -> Tensor:
        norm, epsilon = self.parameters.norm, self.parameters.epsilon
        if norm == "none":
            return call.x
        values = self._workspace.take(tuple(call.x.shape), call.x.dtype)
        normalise_rows(
            call.x, values, norm=norm, norm_weight=call.norm_weight, norm_bias=call.norm_bias, epsilon=epsilon
        )
        return values


def kernel_of(parameters: LinearParameters, tiles: Tiles, rows: int) -> Kernel:
    """The kernel for a call of so many rows."""
    if parameters.path != "int8" and rows <= tiles.gemv_rows:
        return "gemv"
    return "float" if parameters.path == "float" else "int8"


@lru_cache(maxsize=1024)  # alike for all layers of a model, so a prefill of a new length makes few
def plan_of(parameters: LinearParameters, tiles: Tiles, rows: int, n: int, k: int) -> Plan:
    """The launch for `rows` rows and a weight [n, k]."""
    kernel = kernel_of(parameters, tiles, rows)
    width = n // 2 if parameters.gate else n
    if kernel == "gemv":
        few = tiles.gemv(max(rows, 1), n, k, gate=parameters.gate)
        constants = (
            n, k, parameters.norm, parameters.epsilon, parameters.activation, triton.next_power_of_2(rows),
            few.outputs, few.depth, few.unroll,
        )  # fmt: skip
        return Plan(kernel, width, (triton.cdiv(width, few.outputs), 1, 1), constants, (("num_warps", few.warps),), 0)
    tile = tiles.gemm(kernel, max(rows, 1), n, k, gate=parameters.gate)
    programs = tile.tiles(rows, width)
    if tile.splits > 1 and programs > TICKETS:
        raise ValueError(f"{tile} of [{rows}, {width}] are {programs} tiles; those of a split are {TICKETS}")
    parts = programs * tile.splits * (2 if parameters.gate else 1) * tile.outputs * tile.tokens
    return Plan(
        kernel,
        width,
        (programs, tile.splits, 1),
        (n, k, parameters.activation, tile.outputs, tile.tokens, tile.depth, tile.splits, tile.ahead, tile.bulk),
        (("num_warps", tile.warps), ("num_stages", tile.stages)),
        parts if tile.splits > 1 else 0,
        tile if tile.bulk else None,
    )


def _tiled(values: Tensor, weight: Tensor, tile: GemmTile) -> tuple[Tiled, Tiled]:
    (rows, k), n = values.shape, weight.shape[0]
    return (
        Tiled(values, (rows, k), (k, 1), [tile.tokens, tile.depth]),
        Tiled(weight, (n, k), (k, 1), [tile.outputs, tile.depth]),
    )


def check(parameters: LinearParameters, call: Call) -> None:
    """Raise ValueError where a call's tensors do not fit together or the parameters."""
    x, weight, a = call.x, call.weight, call.x.dtype
    if len(x.shape) != 2 or len(weight.shape) != 2 or a not in ROW_TYPES:
        raise ValueError(
            f"x is float16 or bfloat16 [rows, K] and weight int8 [N, K], not {_named(x)}, {_named(weight)}"
        )
    (rows, k), n = x.shape, weight.shape[0]
    if parameters.gate and n % 2:
        raise ValueError(f"silu_gate takes as many rows of gate as of up; the weight has {n}")
    result = (a, (rows, n // 2 if parameters.gate else n))
    expected = (
        (a, (rows, k)), (torch.int8, (n, k)), (torch.float32, (n,)), (a, (n,)), (a, (k,)), (a, (k,)), result, result
    )  # fmt: skip
    for name, tensor, (dtype, shape) in zip(Call._fields, call, expected, strict=True):
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            raise ValueError(f"{name} is {_named(tensor)}; for x {_named(x)} it must be {dtype} {list(shape)}")
    extra_bias = call.norm_bias is not None and parameters.norm != "layer"
    if (call.norm_weight is None) != (parameters.norm == "none") or extra_bias:
        raise ValueError(f"norm {parameters.norm}: rms and layer take a weight, layer also a bias, none neither")


def _named(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _bytes_of_call(parameters: LinearParameters, tiles: Tiles, rows: int, n: int, k: int) -> int:
    plan = plan_of(parameters, tiles, rows, n, k)
    if plan.kernel == "gemv":
        return 0
    if plan.kernel == "int8":
        return bytes_of((rows * k, torch.int8), (rows, torch.float32), (plan.parts, torch.int32))
    copied = rows * k if parameters.norm != "none" else 0
    return bytes_of((copied, torch.bfloat16), (plan.parts, torch.float32))


def _largest_of_buckets(rows: int) -> list[int]:
    """The most rows, up to `rows`, of each bucket: tiles are alike within one."""
    powers = [1 << bits for bits in range(MOST_ROWS.bit_length()) if 1 << bits < rows]
    return [*powers, rows]
