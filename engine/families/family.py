"""What a family must say about a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.spec import ModelSpec

Kind = Literal["linear", "embedding", "plain"]


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the artifact and where it comes from.

    `sources` are concatenated along dimension 0 (fused qkv, gate_up). A `linear` ([out, in]) or an `embedding`
    ([vocab, hidden]) is two-dimensional, later dimensions flattened, and becomes int8 with one scale per row when that
    precision is asked for, beside which `plain` stays fp32. In the other precisions all three have that one type.

    `transposed`: the one source is stored as [in, out]. `offset` is added to every value before it is rounded to its
    type, for checkpoints that store a norm's weight - 1.
    """

    name: str
    kind: Kind
    sources: tuple[Source, ...]
    offset: float = 0.0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        if self.transposed:
            columns, rows = self.sources[0].shape
            return rows, columns
        rows, *rest = self.sources[0].shape
        rows = sum(source.shape[0] for source in self.sources)
        return (rows, math.prod(rest)) if self.kind != "plain" else (rows, *rest)


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """A checkpoint's JSON files as they are; the optional ones are empty when absent."""

    model: Mapping[str, Any]
    generation: Mapping[str, Any]
    preprocessor: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture's checkpoints are read.

    `prefixes` are (spelling in the file, spelling in `Source.name`) pairs, the first match wins: releases of
    transformers moved the same tensors between prefixes.
    """

    name: str
    model_types: tuple[str, ...]
    prefixes: tuple[tuple[str, str], ...]
    spec: Callable[[CheckpointConfig], ModelSpec]
    weights: Callable[[ModelSpec], tuple[Weight, ...]]

    def source_name(self, stored: str) -> str:
        """The spelling of `Source.name` for a tensor name found in a file."""
        for old, new in self.prefixes:
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return stored


def linear(name: str, sources: tuple[tuple[str, int], ...], columns: int, bias: bool = True) -> tuple[Weight, ...]:
    """`name`.weight, and `name`.bias if there is one, from (module, rows) pairs."""
    weight = Weight(f"{name}.weight", "linear", tuple(Source(f"{m}.weight", (rows, columns)) for m, rows in sources))
    if not bias:
        return (weight,)
    return weight, Weight(f"{name}.bias", "plain", tuple(Source(f"{m}.bias", (rows,)) for m, rows in sources))


def layer_norm(name: str, module: str, size: int) -> tuple[Weight, ...]:
    return plain(f"{name}.weight", f"{module}.weight", size), plain(f"{name}.bias", f"{module}.bias", size)


def plain(name: str, source: str, *shape: int, offset: float = 0.0) -> Weight:
    return Weight(name, "plain", (Source(source, shape),), offset)
