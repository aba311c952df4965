"""A linear layer over int8 weights: which kernels a call takes, and their launches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton

from engine.kernels.launcher import Launcher
from engine.kernels.linear.gemm import gemm
from engine.kernels.linear.gemv import gemv
from engine.kernels.norm import normalise_rows, quantise_rows
from engine.kernels.pointer import Tensor
from engine.kernels.tiles import MOST_ROWS, GemmTile, Tiles
from engine.kernels.workspace import TICKETS, Workspace, bytes_of

Norm = Literal["none", "rms", "layer"]
Activation = Literal["none", "silu_gate", "gelu", "gelu_tanh", "quick_gelu"]
Path = Literal["auto", "int8", "float"]
Known = tuple[tuple[int, ...], torch.dtype]  # what is known of a tensor without looking into it
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


class Int8Linear:
    """Launches a layer's kernels on the current stream of the current device; nothing waits for them.

    A row's result does not depend on its neighbours, and on their number only as far as that chooses the kernel and its
    tile. All tensors are row-major, without gaps. For one device: kernels found for one are launched again.
    """

    def __init__(self, parameters: LinearParameters, workspace: Workspace, tiles: Tiles) -> None:
        self.parameters = parameters
        self._workspace, self._tiles = workspace, tiles
        self._gemv, self._gemm = Launcher(gemv), Launcher(gemm)

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
        """Write y A[rows, WIDTH]. Shapes as in `Call`; ValueError where they do not fit.

        DeviceOutOfMemory if the workspace is smaller than `workspace_bytes` says.
        """
        call = Call(x, weight, scale, bias, norm_weight, norm_bias, residual, y)
        check(self.parameters, *(None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in call))
        rows = x.shape[0]
        if not rows:
            return
        kernel = kernel_of(self.parameters, self._tiles, rows)
        if kernel == "gemv":
            self._multiply_few(call)
            return
        with self._workspace.scope():
            values, row_scale = self._quantised(call) if kernel == "int8" else (self._normalised(call), None)
            n, k = weight.shape
            self._multiply(call, values, row_scale, self._tiles.gemm(kernel, rows, n, k, gate=self.parameters.gate))

    @staticmethod
    def workspace_bytes(parameters: LinearParameters, tiles: Tiles, rows: int, n: int, k: int) -> int:
        """What a call of a weight [n, k] with up to `rows` rows takes of the workspace at most."""
        return max(_bytes_of_call(parameters, tiles, count, n, k) for count in _largest_of_buckets(rows))

    def _multiply_few(self, call: Call) -> None:
        parameters = self.parameters
        (rows, k), n = call.x.shape, call.weight.shape[0]
        tile = self._tiles.gemv(rows, n, k, gate=parameters.gate)
        constants = (
            n, k, parameters.norm, parameters.epsilon, parameters.activation, triton.next_power_of_2(rows),
            tile.outputs, tile.depth, tile.unroll,
        )  # fmt: skip
        grid = (triton.cdiv(call.y.shape[1], tile.outputs), 1, 1)
        self._gemv(grid, call, (rows,), constants, (("num_warps", tile.warps),))

    def _multiply(self, call: Call, values: Tensor, row_scale: Tensor | None, tile: GemmTile) -> None:
        (rows, k), (n, width) = call.x.shape, (call.weight.shape[0], call.y.shape[1])
        programs = tile.tiles(rows, width)
        parts = tickets = None
        if tile.splits > 1:
            if programs > TICKETS:
                raise ValueError(f"{tile} of [{rows}, {width}] are {programs} tiles; those of a split are {TICKETS}")
            sums = torch.float32 if row_scale is None else torch.int32
            parts = self._workspace.take((_parts_of(tile, rows, width, self.parameters.gate),), sums)
            tickets = self._workspace.tickets
        pointers = (values, row_scale, call.weight, call.scale, call.bias, call.residual, call.y, parts, tickets)
        constants = (n, k, self.parameters.activation, tile.outputs, tile.tokens, tile.depth, tile.splits)
        options = (("num_warps", tile.warps), ("num_stages", tile.stages))
        self._gemm((programs, tile.splits, 1), pointers, (rows,), constants, options)

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


def kernel_of(parameters: LinearParameters, tiles: Tiles, rows: int) -> Literal["gemv", "int8", "float"]:
    """The kernel for a call of so many rows."""
    if parameters.path != "int8" and rows <= tiles.gemv_rows:
        return "gemv"
    return "float" if parameters.path == "float" else "int8"


@lru_cache(maxsize=4096)  # each step of a model makes the same calls
def check(parameters: LinearParameters, x: Known, weight: Known, *others: Known | None) -> None:
    """Raise ValueError where a call's shapes and types, in its order, do not fit together or the parameters."""
    if len(x[0]) != 2 or len(weight[0]) != 2 or x[1] not in ROW_TYPES:
        raise ValueError(
            f"x is float16 or bfloat16 [rows, K] and weight int8 [N, K], not {_named(x)}, {_named(weight)}"
        )
    (rows, k), n, a = x[0], weight[0][0], x[1]
    if parameters.gate and n % 2:
        raise ValueError(f"silu_gate takes as many rows of gate as of up; the weight has {n}")
    result = ((rows, n // 2 if parameters.gate else n), a)
    expected = (
        x, ((n, k), torch.int8), ((n,), torch.float32), ((n,), a), ((k,), a), ((k,), a), result, result
    )  # fmt: skip
    for name, found, wanted in zip(Call._fields, (x, weight, *others), expected, strict=True):
        if found is not None and found != wanted:
            raise ValueError(f"{name} is {_named(found)}; for x {_named(x)} it must be {_named(wanted)}")
    given = dict(zip(Call._fields[2:], others, strict=True))
    extra_bias = given["norm_bias"] is not None and parameters.norm != "layer"
    if (given["norm_weight"] is None) != (parameters.norm == "none") or extra_bias:
        raise ValueError(f"norm {parameters.norm}: rms and layer take a weight, layer also a bias, none neither")


def _named(known: Known) -> str:
    return f"{known[1]} {list(known[0])}"


def _parts_of(tile: GemmTile, rows: int, width: int, gate: bool) -> int:
    """32-bit words that the programs of split tiles leave to each other."""
    return tile.tiles(rows, width) * tile.splits * (2 if gate else 1) * tile.outputs * tile.tokens


def _bytes_of_call(parameters: LinearParameters, tiles: Tiles, rows: int, n: int, k: int) -> int:
    kernel = kernel_of(parameters, tiles, rows)
    if kernel == "gemv":
        return 0
    tile = tiles.gemm(kernel, rows, n, k, gate=parameters.gate)
    parts = _parts_of(tile, rows, n // 2 if parameters.gate else n, parameters.gate) if tile.splits > 1 else 0
    if kernel == "int8":
        return bytes_of((rows * k, torch.int8), (rows, torch.float32), (parts, torch.int32))
    copied = rows * k if parameters.norm != "none" else 0
    return bytes_of((copied, torch.bfloat16), (parts, torch.float32))


def _largest_of_buckets(rows: int) -> list[int]:
    """The most rows, up to `rows`, of each bucket: tiles are alike within one."""
    powers = [1 << bits for bits in range(MOST_ROWS.bit_length()) if 1 << bits < rows]
    return [*powers, rows]
