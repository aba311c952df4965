"""Each kernel of a fused decode step beside what it replaces, on the same random numbers.

What is replaced is said in torch, 16-bit products by cuBLAS: the same arithmetic in the launches that it takes without
kernels of our own. For attention it is a stand-in: torch's attention over keys and values that lie contiguously, in 16
bits, with neither rotary embedding nor norms nor the write to the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from cli.benches.decode import MIXED
from cli.benches.device_time import Launch, copies_of
from cli.benches.step_work import (
    Layer,
    Work,
    attention_work,
    embedding_work,
    layers_of,
    linear_work,
    norm_work,
    sampling_work,
)
from engine.kernels.attention import AttentionParameters, PagedDecodeAttention
from engine.kernels.embedding import token_embedding
from engine.kernels.launch import TritonSampling
from engine.kernels.linear import Int8Linear, LinearParameters
from engine.kernels.linear.layer import kernel_of
from engine.kernels.norm import quantise_rows
from engine.kernels.operators import Device, workspace_bytes
from engine.kernels.tiles import Tiles
from engine.kernels.workspace import Workspace
from engine.request import SamplingParams
from engine.sampling.device import DeviceSampler, Sampling
from engine.sampling.device_torch import TorchSampling
from engine.spec import DecoderSpec

LOOKED_UP = 32  # sets of tokens, each with rows of the table that no other has lately read
CACHE_SCALE = 1 / 32  # of int8 keys and values


@dataclass(frozen=True, slots=True)
class Pair:
    """Both launch with copy i of what is read, 0 <= i < copies, on the current stream, and return what they wrote."""

    ours: Callable[[int], torch.Tensor]
    replaced: Launch
    copies: int
    kernel: str
    replaces: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where kernels run; `cache_bytes` of its L2, `block_size` tokens to a block of keys and values."""

    device: Device
    cache_bytes: int
    block_size: int

    @property
    def torch_device(self) -> torch.device:
        return self.device.workspace.device

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.device.activations, device=self.torch_device)

    def int8(self, *shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=self.torch_device)

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.device.activations, device=self.torch_device)

    def int32(self, *values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.torch_device)


def cuda_place(
    spec: DecoderSpec,
    device: torch.device,
    activations: torch.dtype,
    tiles: Tiles,
    *,
    block_size: int,
    rows: int,
    context: int,
) -> Place:
    """Takes the workspace for `rows` sequences of `context` tokens."""
    facts = torch.cuda.get_device_properties(device)
    chip, padded = facts.multi_processor_count, -(-context // block_size) * block_size
    nbytes = workspace_bytes(spec, tiles, chip, rows=rows, decoding=[(rows, padded)], block_size=block_size)
    return Place(Device(activations, Workspace(nbytes, device), tiles, chip), facts.L2_cache_size, block_size)


def pairs(spec: DecoderSpec, place: Place, rows: int, context: int) -> Iterator[tuple[Work, Callable[[], Pair]]]:
    """The kernels of `step_work` in its order, each made when it is asked for: they do not fit side by side."""
    yield embedding_work(spec, rows), partial(embedding_pair, spec, place, rows)
    for layer in layers_of(spec):
        yield linear_work(layer, rows), partial(linear_pair, layer, place, rows, spec.norm_eps)
    for int8 in (False, True):
        work = attention_work(spec, rows, context, int8=int8)
        yield work, partial(attention_pair, spec, place, rows, context, int8=int8)
    for mixed in (False, True):
        yield sampling_work(spec, rows, mixed=mixed), partial(sampling_pair, spec, place, rows, mixed=mixed)
    yield norm_work(spec, rows), partial(norm_pair, spec, place, rows)


def linear_pair(layer: Layer, place: Place, rows: int, epsilon: float) -> Pair:
    n, k, tiles = layer.n, layer.k, place.device.tiles
    copies = copies_of(n * k, place.cache_bytes)
    weight = place.int8(copies, n, k)
    scale = torch.full((n,), 1 / (73 * k**0.5), device=place.torch_device)
    wide = place.empty(copies, n, k)
    for number in range(copies):
        wide[number] = weight[number] * scale[:, None]
    x, y = place.normal(rows, k), place.empty(rows, layer.width)
    bias = place.normal(n) if layer.bias else None
    gain = 1 + place.normal(k) / 8 if layer.norm else None
    residual = place.normal(rows, layer.width) if layer.residual else None
    parameters = LinearParameters(
        epsilon=epsilon if layer.norm else 0.0,
        norm="rms" if layer.norm else "none",
        activation="silu_gate" if layer.gate else "none",
    )
    linear = Int8Linear(parameters, place.device.workspace, tiles)

    def ours(number: int) -> torch.Tensor:
        linear(x, weight[number], scale, bias, gain, None, residual, y)
        return y

    def replaced(number: int) -> torch.Tensor:
        rows16 = x if gain is None else functional.rms_norm(x, (k,), gain, epsilon)
        if residual is not None and bias is None:
            return torch.addmm(residual, rows16, wide[number].T)
        product = functional.linear(rows16, wide[number], bias)
        if layer.gate:
            gate, up = product.chunk(2, dim=1)
            return functional.silu(gate) * up
        return product if residual is None else product + residual

    launches = ["rms_norm"] if layer.norm else []
    launches += ["addmm" if layer.residual and not layer.bias else "linear"]
    launches += ["silu, mul"] if layer.gate else ["add"] if layer.residual and layer.bias else []
    return Pair(ours, replaced, copies, kernel_of(parameters, tiles, rows), ", ".join(launches))


def norm_pair(spec: DecoderSpec, place: Place, rows: int) -> Pair:
    x, gain = place.normal(rows, spec.hidden), 1 + place.normal(spec.hidden) / 8
    values, scales = place.int8(rows, spec.hidden), torch.zeros(rows, device=place.torch_device)

    def ours(_: int) -> torch.Tensor:
        quantise_rows(x, values, scales, norm="rms", norm_weight=gain, epsilon=spec.norm_eps)
        return values

    def replaced(_: int) -> torch.Tensor:
        return functional.rms_norm(x, (spec.hidden,), gain, spec.norm_eps)

    return Pair(ours, replaced, 1, "rows", "rms_norm, in 16 bits")


def embedding_pair(spec: DecoderSpec, place: Place, rows: int) -> Pair:
    ids = torch.randint(0, spec.vocab, (LOOKED_UP, rows), dtype=torch.int32, device=place.torch_device)
    wide_ids = ids.long()
    table = place.int8(spec.vocab, spec.hidden)
    scale = torch.full((spec.vocab,), 1 / 73, device=place.torch_device)
    wide = place.empty(spec.vocab, spec.hidden)
    torch.mul(table, scale[:, None], out=wide)
    no_feature, features = place.int32(*[-1] * rows), place.normal(1, spec.hidden)
    slot_tokens, out = place.int32(0), place.empty(rows, spec.hidden)

    def ours(number: int) -> torch.Tensor:
        token_embedding(ids[number], slot_tokens, table, scale, no_feature, features, out)
        return out

    def replaced(number: int) -> torch.Tensor:
        return functional.embedding(wide_ids[number], wide)

    return Pair(ours, replaced, LOOKED_UP, "look-up", "embedding of a 16-bit table")


def attention_pair(spec: DecoderSpec, place: Place, rows: int, context: int, *, int8: bool) -> Pair:
    """All sequences have `context` tokens with the new one; their blocks lie scattered."""
    cache = _Cache(spec, place, rows, context, int8=int8)
    qkv = place.normal(rows, (spec.heads + 2 * spec.kv_heads) * spec.head_dim)
    out = place.empty(rows, spec.heads * spec.head_dim)
    turns = place.empty(context, spec.head_dim // 2)
    cosine, sine = turns.fill_(1), torch.zeros_like(turns)  # turned by nothing, so that both compute the same
    past = place.int32(*[context - 1] * rows)
    three = spec.rope.axes == 3
    positions = place.int32(*[context - 1] * 3 * rows).view(3, rows) if three else None
    head_norm = torch.ones_like(cosine[0]).repeat(2) if spec.qk_norm else None
    parameters = AttentionParameters(
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        mrope_section=spec.rope.mrope_section if three else (),
        mrope_interleaved=spec.rope.mrope_interleaved,
        qk_norm_epsilon=spec.norm_eps if spec.qk_norm else None,
    )
    attention = PagedDecodeAttention(parameters, place.device.workspace, place.device.multiprocessors)
    contiguous = [cache.contiguous(number, qkv) for number in range(cache.copies)]
    query = qkv[:, : spec.heads * spec.head_dim].view(rows, spec.heads, 1, spec.head_dim)

    def ours(number: int) -> torch.Tensor:
        attention(
            qkv, cache.keys, cache.values, past, cache.tables[number], cosine, sine, positions, head_norm, head_norm,
            cache.scale, cache.scale, out,
        )  # fmt: skip
        return out

    def replaced(number: int) -> torch.Tensor:
        keys, values = contiguous[number]
        mixed = functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return mixed.view(rows, spec.heads * spec.head_dim)

    return Pair(ours, replaced, cache.copies, "paged", "stand-in: torch's attention, contiguous, 16 bits")


class _Cache:
    """Blocks for copies of so many sequences that no copy stays in L2; block 0 belongs to nobody."""

    def __init__(self, spec: DecoderSpec, place: Place, rows: int, context: int, *, int8: bool) -> None:
        self._spec, self._context = spec, context
        columns = -(-context // place.block_size)
        token_bytes = 2 * spec.kv_heads * spec.head_dim * (1 if int8 else 2)
        self.copies = copies_of(rows * context * token_bytes, place.cache_bytes)
        blocks = self.copies * rows * columns
        shape = (1 + blocks, place.block_size, spec.kv_heads, spec.head_dim)
        draw = place.int8 if int8 else place.normal
        self.keys, self.values = draw(*shape), draw(*shape)
        order = torch.randperm(blocks, device=place.torch_device).to(torch.int32) + 1
        self.tables = order.view(self.copies, rows, columns)
        scales = torch.full((spec.kv_heads, 1, spec.head_dim), CACHE_SCALE, device=place.torch_device)
        self.scale = scales if int8 else None

    def contiguous(self, number: int, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, kv_heads, context, head_dim] of a copy in 16 bits, those of `qkv` at the end."""
        new = qkv[:, self._spec.heads * self._spec.head_dim :].view(len(qkv), 2, self._spec.kv_heads, -1)
        key, value = (self._gathered(cache, number, qkv.dtype) for cache in (self.keys, self.values))
        key[:, :, -1], value[:, :, -1] = new[:, 0], new[:, 1]
        return key, value

    def _gathered(self, cache: torch.Tensor, number: int, dtype: torch.dtype) -> torch.Tensor:
        tokens = cache[self.tables[number].long()].flatten(1, 2)[:, : self._context].to(dtype)
        tokens = tokens if self.scale is None else tokens * CACHE_SCALE
        return tokens.transpose(1, 2).contiguous()


def sampling_pair(spec: DecoderSpec, place: Place, rows: int, *, mixed: bool) -> Pair:
    """Logits are not rotated: the head wrote them just before, and most of them are in L2."""
    device, dtype = place.torch_device, place.device.activations
    logits = 4 * place.normal(rows, spec.vocab)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    kinds = MIXED if mixed else ({},)

    def sampler(sampling: Sampling) -> Callable[[int], torch.Tensor]:
        made = DeviceSampler(rows, spec.vocab, device, dtype, sampling=sampling)
        for slot in range(rows):
            params = SamplingParams(**kinds[slot % len(kinds)])
            made.assign(slot, params, slot, np.zeros(1, np.int64), [], ())
        return lambda _: made.sample(logits, slots)

    ours, replaced = sampler(TritonSampling(spec.vocab, device, dtype)), sampler(TorchSampling())
    return Pair(ours, replaced, 1, "two kernels", "the sampler in torch")
