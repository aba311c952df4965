"""The operators of engine/graphs/cuda/fused.py and fused_tower.py: a node's parameters and tensors become launches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from engine.errors import KernelsUnavailable
from engine.kernels.attention import AttentionParameters, PagedDecodeAttention
from engine.kernels.bridge import Call, Compute, Input, Operator
from engine.kernels.bridge.tensors import rows_of
from engine.kernels.embedding import token_embedding
from engine.kernels.linear import Int8Linear, LinearParameters
from engine.kernels.linear.layer import Activation, Path
from engine.kernels.linear_bench import Layer
from engine.kernels.pointer import Tensor
from engine.kernels.tiles import Tiles
from engine.kernels.workspace import Workspace
from engine.spec import DecoderSpec

ROWS_AT_ONCE = 8192  # of a product: a tower's calls have more, and scratch memory for them would be idle else


@dataclass(frozen=True, slots=True)
class Device:
    """What the launches of one device share; `activations` float16 or bfloat16."""

    activations: torch.dtype
    workspace: Workspace
    tiles: Tiles
    multiprocessors: int


def decoder_operators(device: Device) -> tuple[Operator, ...]:
    """TokenEmbedding, Linear and PagedDecode, the last for caches of activations and of int8."""
    return _embedding(device), _linear(device), _attention(device, device.activations), _attention(device, torch.int8)


def workspace_bytes(
    spec: DecoderSpec,
    tiles: Tiles,
    multiprocessors: int,
    *,
    rows: int,
    decoding: Iterable[tuple[int, int]],
    block_size: int,
    tower: Iterable[Layer] = (),
) -> int:
    """The most that an operator takes: calls of up to `rows` tokens, decode steps of (sequences, context) each, and a
    tower's layers with any number of rows.
    """
    attended = spec.heads * spec.head_dim
    linears: list[tuple[Activation, int, int]] = [
        ("none", attended + 2 * spec.kv_heads * spec.head_dim, spec.hidden),
        ("none", spec.hidden, attended),
        ("silu_gate", 2 * spec.intermediate, spec.hidden),
        ("none", spec.hidden, spec.intermediate),
        ("none", spec.vocab, spec.hidden),
    ]
    rows = min(rows, ROWS_AT_ONCE)
    calls = [(LinearParameters(norm="rms", activation=activation), rows, n, k) for activation, n, k in linears]
    calls += [(layer.parameters, ROWS_AT_ONCE, layer.n, layer.k) for layer in tower]
    products = (
        Int8Linear.workspace_bytes(replace(parameters, path=path), tiles, most, n, k)
        for parameters, most, n, k in calls
        for path in get_args(Path)
    )
    attention = PagedDecodeAttention(
        AttentionParameters(spec.heads, spec.kv_heads, spec.head_dim),
        Workspace(0, torch.device("cpu")),
        multiprocessors,
    )
    splits = (
        attention.scratch_bytes(batch, context, block_size, int8=int8)
        for batch, context in decoding
        for int8 in (False, True)
    )
    return max(max(products), max(splits, default=0))


def try_out(device: Device) -> None:
    """Compile and launch the smallest kernel and wait for it; raises KernelsUnavailable if that does not work."""
    place, a = device.workspace.device, device.activations
    zero, out = torch.zeros(1, dtype=torch.int32, device=place), torch.empty((1, 16), dtype=a, device=place)
    table, scale = torch.ones((1, 16), dtype=torch.int8, device=place), torch.ones(1, device=place)
    try:
        token_embedding(zero, zero, table, scale, zero - 1, out.clone(), out)
        works = bool((out == 1).all())
    except Exception as error:  # whatever Triton, the compiler or the driver raise
        raise KernelsUnavailable(f"Triton cannot compile and run a kernel: {error}") from error
    if not works:
        raise KernelsUnavailable(f"a Triton kernel gave wrong numbers on {place}")


def _embedding(device: Device) -> Operator:
    def open_node(_: Mapping[str, Any]) -> Compute:
        return _embed

    a = device.activations
    inputs = (torch.int32, torch.int32, torch.int8, torch.float32, torch.int32, a)
    return Operator("TokenEmbedding", tuple(map(Input, inputs)), (a,), open_node)


def _embed(call: Call) -> None:
    ids, slot_tokens, table, scale, feature_index, features = (_given(call, index) for index in range(6))
    out = call.output(0, (ids.shape[0], table.shape[1]))
    token_embedding(ids, slot_tokens, table, scale, feature_index, features, out)


def _linear(device: Device) -> Operator:
    def open_node(parameters: Mapping[str, Any]) -> Compute:
        layer = Int8Linear(LinearParameters(**parameters), device.workspace, device.tiles)

        def compute(call: Call) -> None:
            x, weight, scale = (_given(call, index) for index in range(3))
            bias, norm_weight, norm_bias, residual = (call.input(index) for index in range(3, 7))
            width = weight.shape[0] // 2 if layer.parameters.gate else weight.shape[0]
            y = call.output(0, (x.shape[0], width))
            if x.shape[0] <= ROWS_AT_ONCE:
                layer(x, weight, scale, bias, norm_weight, norm_bias, residual, y)
                return
            for start in range(0, x.shape[0], ROWS_AT_ONCE):
                part = start, min(start + ROWS_AT_ONCE, x.shape[0])
                added = None if residual is None else rows_of(residual, *part)
                layer(rows_of(x, *part), weight, scale, bias, norm_weight, norm_bias, added, rows_of(y, *part))

        return compute

    a = device.activations
    optional = (Input(a, optional=True),) * 4
    return Operator("Linear", (Input(a), Input(torch.int8), Input(torch.float32), *optional), (a,), open_node)


def _attention(device: Device, cache: torch.dtype) -> Operator:
    def open_node(parameters: Mapping[str, Any]) -> Compute:
        attention = PagedDecodeAttention(AttentionParameters(**parameters), device.workspace, device.multiprocessors)
        width = attention.parameters.heads * attention.parameters.head_dim

        def compute(call: Call) -> None:
            qkv, key_cache, value_cache, past, blocks, cosine, sine = (_given(call, index) for index in range(7))
            positions, query_norm, key_norm, key_scale, value_scale = (call.input(index) for index in range(7, 12))
            out = call.output(0, (qkv.shape[0], width))
            attention(
                *(qkv, key_cache, value_cache, past, blocks, cosine, sine),
                *(positions, query_norm, key_norm, key_scale, value_scale, out),
            )

        return compute

    a = device.activations
    required = (a, cache, cache, torch.int32, torch.int32, a, a)
    optional = (torch.int32, a, a, torch.float32, torch.float32)
    inputs = (*map(Input, required), *(Input(dtype, optional=True) for dtype in optional))
    return Operator("PagedDecode", inputs, (a,), open_node)


def _given(call: Call, index: int) -> Tensor:
    tensor = call.input(index)
    assert tensor is not None, f"This is a bug: input {index} is not optional."
    return tensor
