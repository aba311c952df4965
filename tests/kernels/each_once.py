"""Each kernel launched on small shapes, every way through it once: what test_sanitizer.py lets a sanitizer watch.

    python -m tests.kernels.each_once

prints a line for each launch that it made. Sizes are ragged, so that what a mask forgets lies behind an allocation's
end; with PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from engine.kernels.attention import AttentionParameters, AttentionTile
from engine.kernels.embedding import token_embedding
from engine.kernels.launch import TritonSampling
from engine.kernels.linear.layer import LinearParameters
from engine.kernels.norm import Norm
from engine.kernels.overlap import copies_in_bulk
from engine.kernels.tiles import GemmTile, Product, Tiles, rows_bucket
from engine.request import SamplingParams
from engine.sampling.device import DeviceSampler
from tests.kernels import decode_attention_cases, linear_cases, norm_cases

DEVICE, ON_GPU = linear_cases.DEVICE, linear_cases.ON_GPU
HALF, BFLOAT16 = torch.float16, torch.bfloat16
ALONE = GemmTile(outputs=64, tokens=16, depth=64, splits=1, warps=4, stages=3)
SPLIT = GemmTile(outputs=64, tokens=16, depth=64, splits=2, warps=4, stages=3)
AHEAD = GemmTile(outputs=64, tokens=16, depth=64, splits=1, warps=4, stages=3, ahead=2)
LARGE = GemmTile(outputs=128, tokens=128, depth=128, splits=1, warps=8, stages=3)
BULK = GemmTile(outputs=128, tokens=128, depth=128, splits=1, warps=8, stages=3, bulk=True)
TILED = {"alone": (ALONE, 21), "split": (SPLIT, 21), "ahead": (AHEAD, 13), "large": (LARGE, 150), "bulk": (BULK, 150)}
MANY, FEW = AttentionTile(tokens=16, least=16, merged=2), AttentionTile(tokens=64, warps=4)
Launch = Callable[[], object]


def launches() -> Iterator[tuple[str, Launch]]:
    yield from gemvs()
    yield from gemms()
    yield from norms()
    yield from attentions()
    yield "embed_tokens", embedding
    for name, parameters in SAMPLED.items():
        yield f"forbid_tokens, scan_chunks, choose_tokens: {name}", partial(sampling, parameters)


def gemvs() -> Iterator[tuple[str, Launch]]:
    cases = (1, "rms", "silu_gate", 200), (3, "layer", "gelu", 96), (1, "none", "none", 4608)
    for rows, norm, activation, k in cases:
        parameters = LinearParameters(1e-6, norm, activation)  # type: ignore[arg-type]
        yield f"gemv: {rows} rows, {norm}, {activation}", partial(linear, rows, 90, k, parameters)


def gemms() -> Iterator[tuple[str, Launch]]:
    for path, (name, (tile, rows)) in itertools.product(("int8", "float"), TILED.items()):
        for norm, activation in (("rms", "silu_gate"), ("none", "none")):
            if path == "float" and name in ("large", "ahead", "bulk"):  # they are the int8 rows' alone
                continue
            if tile.bulk and ON_GPU and not copies_in_bulk(DEVICE):
                continue
            parameters = LinearParameters(1e-6 * (norm != "none"), norm, activation, path)  # type: ignore[arg-type]
            yield (
                f"gemm: {path} rows, {name}, {activation}",
                partial(linear, rows, 180, 272 if tile.bulk else 264, parameters, tile),
            )


def linear(rows: int, n: int, k: int, parameters: LinearParameters, tile: GemmTile | None = None) -> None:
    inputs = linear_cases.draw(rows, n, k, parameters, BFLOAT16 if rows > 1 else HALF)
    tiles = Tiles()
    if tile is not None:
        kernel: Any = parameters.path
        tiles = Tiles({Product(kernel, rows_bucket(rows), n, k, parameters.gate): tile}, gemv_rows=0)
    linear_cases.run(inputs, parameters, tiles)


def norms() -> Iterator[tuple[str, Launch]]:
    draw, quantised = norm_cases.draw, norm_cases.quantised
    kinds: tuple[Norm, ...] = ("rms", "layer")
    for kind, width in itertools.product(kinds, (72, 1500)):
        affine = norm_cases.affine(kind, width, HALF)
        added = partial(quantised, draw(5, width), residual=draw(5, width), **affine)
        yield f"_normalised_rows: {kind}, {width}", added
    yield "_normalised_rows: none", partial(quantised, draw(5, 72))
    yield "_normalised_rows: rows together", partial(quantised, draw(1027, 72))
    yield "_activated_rows: silu_gate", partial(norm_cases.activated, draw(5, 144), 72, "silu_gate")
    yield "_activated_rows: gelu_tanh", partial(norm_cases.activated, draw(5, 72), 72, "gelu_tanh")


def attentions() -> Iterator[tuple[str, Launch]]:
    sizes = (
        AttentionParameters(12, 2, 128),
        AttentionParameters(9, 3, 64, mrope_section=(8, 12, 12)),
        AttentionParameters(4, 2, 64, mrope_section=(14, 8, 10), mrope_interleaved=True, qk_norm_epsilon=1e-6),
        AttentionParameters(34, 2, 80),
        AttentionParameters(2, 1, 256),
    )
    for size, int8 in itertools.product(sizes, (False, True)):
        name = f"decode_attention: {size.heads}/{size.kv_heads} x {size.head_dim}{', int8' if int8 else ''}"
        step = partial(decode_attention_cases.Step, size, [0, 37, 63], int8=int8)
        yield f"{name}, split", step(tile=MANY, page=16).run
        yield f"{name}, whole", step(tile=FEW, page=64, dtype=BFLOAT16).run


def embedding() -> None:
    ids = torch.tensor([4, -1, -2, 0], dtype=torch.int32).to(DEVICE)
    index = torch.tensor([-1, -1, -1, 1], dtype=torch.int32).to(DEVICE)
    table = torch.ones((9, 72), dtype=torch.int8).to(DEVICE)
    features, out = torch.ones((2, 72), dtype=HALF).to(DEVICE), torch.zeros((4, 72), dtype=HALF).to(DEVICE)
    slots = torch.tensor([8, 3], dtype=torch.int32).to(DEVICE)
    token_embedding(ids, slots, table, torch.ones(9).to(DEVICE), index, features, out)


SAMPLED: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "filters": [{"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.7, "top_k": 40}, {"min_p": 0.05}],
    "penalties": [{"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3}, {"presence_penalty": 0.5}],
}


def sampling(kinds: list[dict[str, Any]]) -> None:
    vocab = 5003
    sampler = DeviceSampler(len(kinds), vocab, DEVICE, HALF, sampling=TritonSampling(vocab, DEVICE, HALF))
    for slot, params in enumerate(kinds):
        sampler.assign(slot, SamplingParams(**params), 7, np.arange(0, vocab, 50), [4, 5, 5], [9])
    logits = torch.randn((len(kinds), vocab), generator=torch.Generator().manual_seed(0)).to(HALF).to(DEVICE)
    masks = torch.full((len(kinds), -(-vocab // 32)), 0x5A5A5A5A, dtype=torch.int32)
    sampler.constrain(logits, sampler.rows(range(len(kinds))), masks)
    sampler.sample(logits, torch.arange(len(kinds), dtype=torch.int32).to(DEVICE))


def main() -> int:
    for name, launch in launches():
        launch()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
