"""The kernels of a fused decode step: how often each runs, and what it must read, write and compute.

Bytes are counted once each, whatever a kernel reads twice: weights, keys and values, and the rows that go in and out.
Activations have 16 bits. How many bytes and operations a chip does in a second is `limits.Rates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cli.benches.limits import Cost
from engine.spec import DecoderSpec

A = 2  # bytes of an activation
FLOAT32 = 4
Operands = Literal["int8", "16 bit"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer [n, k] of int8 weights with what its kernel takes along; `count` of them in a step."""

    name: str
    n: int
    k: int
    count: int
    norm: bool = False
    gate: bool = False  # silu of the first half of n, times the second half
    bias: bool = False
    residual: bool = False

    @property
    def width(self) -> int:
        """Of what comes out."""
        return self.n // 2 if self.gate else self.n

    def cost(self, rows: int) -> Cost:
        vectors = FLOAT32 * self.n + A * (self.n * self.bias + self.k * self.norm)
        around = A * rows * (self.k + self.width * (2 if self.residual else 1))
        return Cost(self.n * self.k + vectors + around, 2 * rows * self.n * self.k)


@dataclass(frozen=True, slots=True)
class Work:
    """`count` 0: it runs inside another kernel of the list, or is there to compare. `operands`: what is multiplied."""

    name: str
    count: int
    cost: Cost
    operands: Operands = "16 bit"


def layers_of(spec: DecoderSpec) -> tuple[Layer, ...]:
    count, hidden, inner = spec.layers, spec.hidden, spec.intermediate
    attended = spec.heads * spec.head_dim
    packed = attended + 2 * spec.kv_heads * spec.head_dim
    return (
        Layer("qkv", packed, hidden, count, norm=True, bias=spec.qkv_bias),
        Layer("out", hidden, attended, count, bias=spec.attention_out_bias, residual=True),
        Layer("gate, up, SiLU", 2 * inner, hidden, count, norm=True, gate=True, bias=spec.mlp_bias),
        Layer("down", hidden, inner, count, bias=spec.mlp_bias, residual=True),
        Layer("head", spec.vocab, hidden, 1, norm=True),
    )


def linear_work(layer: Layer, rows: int) -> Work:
    return Work(layer.name, layer.count, layer.cost(rows), "int8")


def norm_work(spec: DecoderSpec, rows: int) -> Work:
    """RMS norm to int8 rows and their scales: a launch inside the linear layers that quantise."""
    read = A * (rows + 1) * spec.hidden
    return Work("norm, int8 rows", 0, Cost(read + rows * (spec.hidden + FLOAT32), 4 * rows * spec.hidden))


def attention_work(spec: DecoderSpec, rows: int, context: int, *, int8: bool) -> Work:
    """`rows` sequences, each of which has `context` tokens with the new one, that it writes instead of reading it."""
    cached = rows * context * 2 * spec.kv_heads * spec.head_dim * (1 if int8 else A)
    around = A * rows * (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim
    operations = 4 * rows * context * spec.heads * spec.head_dim
    return Work(attention_name(int8=int8), spec.layers, Cost(cached + around, operations))


def attention_name(*, int8: bool) -> str:
    return "attention, int8 cache" if int8 else "attention, 16-bit cache"


def embedding_work(spec: DecoderSpec, rows: int) -> Work:
    return Work("embedding", 1, Cost(rows * (spec.hidden * (1 + A) + FLOAT32), rows * spec.hidden))


def sampling_work(spec: DecoderSpec, rows: int, *, mixed: bool) -> Work:
    name, count = ("sampling, mixed", 0) if mixed else ("sampling, greedy", 1)
    return Work(name, count, Cost(A * rows * spec.vocab, rows * spec.vocab))


def step_work(spec: DecoderSpec, rows: int, context: int) -> list[Work]:
    """All of them for a step of `rows` sequences, the cache in either type: a step takes one of the two."""
    return [
        embedding_work(spec, rows),
        *(linear_work(layer, rows) for layer in layers_of(spec)),
        *(attention_work(spec, rows, context, int8=int8) for int8 in (False, True)),
        *(sampling_work(spec, rows, mixed=mixed) for mixed in (False, True)),
        norm_work(spec, rows),
    ]


def in_step(works: Sequence[Work], *, int8_cache: bool) -> list[Work]:
    """Those that a step with this cache launches."""
    other = attention_name(int8=not int8_cache)
    return [work for work in works if work.count and work.name != other]
