"""The compiled kernels on a CUDA device, over a vocabulary of full size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.request import SamplingParams
from engine.sampling import NO_TOKEN
from engine.sampling.device import DeviceSampler
from tests.sampling.test_device_sampler import MIXES, number_of, probabilities, random_masks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB = 151_936
CUDA = torch.device("cuda")
WIDE: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_p": 0.97},
    {"temperature": 1.0, "top_k": 60_000, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 1e-4, "top_p": 0.99, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 900},
]
ALL = [*MIXES, *WIDE]
PROMPT, OUTPUT, FORBIDDEN = list(range(0, VOCAB, 50)), [4, 5, 5, 6], [7, VOCAB - 1]
ROUNDING = 1e-5  # of the mass: float32 sums over the vocabulary, and the device's exp2


def draw_logits(rows: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return (torch.randn((rows, VOCAB), generator=generator, device=CUDA) * 3).to(dtype)


def sampler_of(rows: int, dtype: torch.dtype = torch.float16) -> DeviceSampler:
    sampler = DeviceSampler(rows, VOCAB, CUDA, dtype)
    assert type(sampler._sampling).__name__ == "TritonSampling"
    for row in range(rows):
        params = SamplingParams(**ALL[row % len(ALL)])
        sampler.assign(row, params, 70 + row, np.array(PROMPT), OUTPUT, FORBIDDEN)
    return sampler


def slots_of(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=CUDA)


def assert_is_the_draw(token: int, logits: torch.Tensor, mix: dict[str, Any], number: float) -> None:
    p = probabilities(logits, SamplingParams(**mix), PROMPT, OUTPUT, FORBIDDEN)
    wider = {**mix, "top_p": min(1.0, mix.get("top_p", 1.0) + ROUNDING)}
    assert _has(probabilities(logits, SamplingParams(**wider), PROMPT, OUTPUT, FORBIDDEN), token), "filtered out"
    below = float(p[:token].sum())
    assert below - ROUNDING <= number <= below + p[token] + ROUNDING, (mix, token, number)


def _has(p: NDArray[np.float64], token: int) -> bool:
    return bool(p[token] > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_row_is_the_draw_of_the_reference(dtype: torch.dtype) -> None:
    rows = len(ALL)
    sampler, logits = sampler_of(rows, dtype), draw_logits(rows, dtype)
    for row, token in enumerate(sampler.sample(logits, slots_of(list(range(rows)))).tolist()):
        assert_is_the_draw(token, logits[row].float().cpu(), ALL[row], number_of(70 + row, len(OUTPUT)))


def test_a_row_has_the_same_tokens_alone_and_in_a_batch_step_after_step() -> None:
    rows, dtype = 48, torch.bfloat16
    together, alone = sampler_of(rows, dtype), sampler_of(rows, dtype)
    for step in range(3):
        logits = draw_logits(rows, dtype, seed=step)
        expected = [int(alone.sample(logits[row : row + 1], slots_of([row]))[0]) for row in range(rows)]
        order = list(range(rows))[::-1]
        assert together.sample(logits[order], slots_of(order)).tolist() == expected[::-1]


def test_a_bad_row_leaves_its_neighbours_alone() -> None:
    logits = draw_logits(3, torch.float16)
    good = sampler_of(3).sample(logits, slots_of([0, 1, 2])).tolist()
    logits[1, 77_000] = torch.nan
    assert sampler_of(3).sample(logits, slots_of([0, 1, 2])).tolist() == [good[0], NO_TOKEN, good[2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_masks_forbid_in_their_rows_alone(dtype: torch.dtype) -> None:
    sampler, logits = sampler_of(32, dtype), draw_logits(32, dtype)
    before, rows = logits.clone(), list(range(31, 0, -2))
    memory = sampler.mask_memory(len(rows), VOCAB // 32 + 3)
    words = random_masks(*memory.shape)
    memory.numpy()[:] = words
    sampler.constrain(logits, sampler.rows(rows), memory)
    allowed = torch.from_numpy(np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :VOCAB]).to(CUDA) > 0
    before[rows] = before[rows].masked_fill_(~allowed, -torch.inf)
    assert torch.equal(logits, before)


def test_neither_assign_nor_constrain_nor_sample_waits_for_the_device() -> None:
    sampler, logits, slots = sampler_of(24), draw_logits(24, torch.float16), slots_of(list(range(24)))
    sampler.sample(logits, slots)
    everything = sampler.mask_memory(24, VOCAB // 32)
    everything.fill_(-1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row in range(24):
            sampler.assign(row, SamplingParams(**ALL[row % len(ALL)]), row, np.array(PROMPT), OUTPUT, FORBIDDEN)
        sampler.constrain(logits, sampler.rows(list(range(24))), everything)
        tokens = sampler.sample(logits, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens, sampler.slot_tokens[:24])
