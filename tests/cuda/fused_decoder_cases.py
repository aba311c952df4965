"""Decode steps of the fused decoder through ONNX Runtime: our kernels as its operators, against their torch twins.

Run by test_fused_decoder.py in a process whose Triton interprets: the graph then runs on ONNX Runtime's CPU provider.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.graphs.cuda import PARTS, CudaGraph, StepInputs
from engine.graphs.cuda.fused import Fusion
from engine.kernels.operators import workspace_bytes
from engine.spec import FloatType
from tests.cuda.cpu_provider import CpuProviderSession
from tests.cuda.interpreted import MULTIPROCESSORS, TILES, interpreted_session
from tests.cuda.paged import BLOCK, CONTEXT, SLOTS, STEP_TOKENS, Paged, Part
from tests.runtime.cases import relative_error
from tests.runtime.conftest import Tiny, make_tiny

NOISE = {"float16": 5e-3, "bfloat16": 8e-2}


def session(
    tiny: Tiny, folder: Path, graph: CudaGraph, weights: dict[str, torch.Tensor], place: Path
) -> CpuProviderSession:
    needed = workspace_bytes(
        tiny.spec.decoder, TILES, MULTIPROCESSORS, rows=STEP_TOKENS, decoding=[(SLOTS, CONTEXT)], block_size=BLOCK
    )
    return interpreted_session(graph, weights, place, folder, weights["norm.weight"].dtype, needed)


def logits(paged: Paged, steps: list[list[Part]]) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    return [paged.step(*parts) for parts in steps]


@pytest.mark.parametrize(
    ("name", "activations", "int8_cache", "int8_rows"),
    [
        ("llama", "float16", False, False),
        ("qwen2", "float16", False, False),  # biases
        ("qwen3", "float16", True, False),  # norms of queries and keys
        ("qwen2_vl", "float16", False, True),  # three positions, in sections
        ("qwen3_vl", "float16", True, False),  # norms, three positions in turn
        ("qwen2_vl", "bfloat16", True, True),
    ],
)
def test_decode_steps_are_those_of_the_torch_operators(
    tmp_path_factory: pytest.TempPathFactory, name: str, activations: FloatType, int8_cache: bool, int8_rows: bool
) -> None:
    model = make_tiny(name, tmp_path_factory)
    make_case = model.case_anywhere if model.spec.decoder.rope.axes == 3 else model.text_case
    cases = [make_case(40, seed=seed) for seed in (6, 7)]
    steps = [
        [Part(1, cases[0], 0, 30), Part(3, cases[1], 0, BLOCK)],  # the first key of the next step opens a block
        [Part(1, cases[0], 30, 31), Part(3, cases[1], BLOCK, BLOCK + 1)],
        [Part(3, cases[1], BLOCK + 1, BLOCK + 2)],
        [Part(3, cases[1], BLOCK + 2, BLOCK + 3), Part(1, cases[0], 31, 32)],
    ]
    scales = _scales(model) if int8_cache else None
    # Where a rounding of 16 bits differs, a quantised row may differ by a whole step.
    fusion = Fusion(linear=True, attention=True, float_inputs=frozenset() if int8_rows else _linears(model))
    ours = Paged(
        *(model, "int8", activations),
        scales=scales,
        fusion=fusion,
        open_decoding=partial(session, model, tmp_path_factory.mktemp("kernels")),
    )
    twins = Paged(model, "int8", activations, scales=scales, fusion=fusion)
    for found, wanted in zip(logits(ours, steps), logits(twins, steps), strict=True):
        error = relative_error(found, wanted)
        print(error)
        assert error < NOISE[activations]


def _linears(model: Tiny) -> frozenset[str]:
    return frozenset(name.removesuffix(".scale") for name in model.artifact("int8").entries if name.endswith(".scale"))


def _scales(model: Tiny) -> dict[str, torch.Tensor]:
    """Of keys and values of up to about 4."""
    spec = model.spec.decoder
    shape = (spec.kv_heads, 1, spec.head_dim)
    return {
        StepInputs.cache_scale(part, layer): torch.full(shape, 4 / 127)
        for part in PARTS
        for layer in range(spec.layers)
    }
