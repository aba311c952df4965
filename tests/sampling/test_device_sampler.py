"""The device sampler against a plain float64 reference. Run by Triton's interpreter too: test_device_interpreted.py."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.request import SamplingParams
from engine.sampling import NO_TOKEN, SamplerState, sample
from engine.sampling.device import DeviceSampler
from engine.sampling.philox import uniforms

CPU = torch.device("cpu")
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
ROWS = 2 if INTERPRETED else 24  # the interpreter takes some 50 ms a row
NO_PROMPT = np.empty(0, np.int64)
ROUNDING = 2e-6  # of the mass: float32 sums, and weights of exp2 instead of exp
MIXES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 250},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 5.0, "top_p": 0.98},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 9.0, "min_p": 0.2, "top_p": 0.9},
    {"temperature": 9.0, "min_p": 0.2, "top_k": 200, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 2.0, "frequency_penalty": 1.0, "top_p": 0.95},
    {"temperature": 1e-30},
]
NAMES = [",".join(f"{name} {value}" for name, value in mix.items()) or "greedy" for mix in MIXES]
VOCAB = 300


def draw_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy((np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32))


def probabilities(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int], forbidden: list[int]
) -> NDArray[np.float64]:
    """Of the next token, computed the slow and obvious way."""
    x = logits.double().numpy().copy()
    for token in set(prompt) | set(output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    x[forbidden] = -np.inf
    if params.is_greedy:
        x, params = np.where(x == x.max(), 0.0, -np.inf), SamplingParams(temperature=1.0, top_p=1e-9)
        x[np.argmax(x) + 1 :] = -np.inf
    p = np.exp((x - x.max()) / max(params.temperature, 1e-5))
    p[p < params.min_p * p.max()] = 0.0
    if 0 < params.top_k < len(p):
        p[p < np.sort(p)[-params.top_k]] = 0.0
    if params.top_p < 1.0:
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]
        p[p < p[order[before < params.top_p * p.sum()]].min()] = 0.0
    normalised: NDArray[np.float64] = p / p.sum()
    return normalised


def assert_is_the_draw(token: int, p: NDArray[np.float64], number: float) -> None:
    """token is where number falls in the running sum of p, give or take what rounding moves a boundary by."""
    below = float(p[:token].sum())
    assert p[token] > 0, f"token {token} was filtered out"
    assert below - ROUNDING <= number <= below + p[token] + ROUNDING, (token, number)


def number_of(seed: int, step: int) -> float:
    return float(uniforms(np.array([seed], np.uint64), np.array([step], np.uint64))[0])


def device_sampler(slots: int, vocab: int = VOCAB) -> DeviceSampler:
    return DeviceSampler(slots, vocab, CPU, torch.float32)


def test_the_way_of_sampling_is_the_one_this_run_is_for() -> None:
    assert type(device_sampler(1)._sampling).__name__ == ("TritonSampling" if INTERPRETED else "TorchSampling")


def test_without_a_compiler_torch_takes_over_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch = pytest.importorskip("engine.kernels.launch")

    def no_compiler(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease set CC.")

    monkeypatch.setattr(launch, "can_run_on", lambda device: True)
    monkeypatch.setattr(launch.TritonSampling, "_try", no_compiler)
    with caplog.at_level("INFO", logger="engine.sampling.device"):
        sampler = device_sampler(1)
        sampler.assign(0, SamplingParams(), 0, NO_PROMPT, [], [0])
        assert tokens_of(sampler, torch.zeros(1, VOCAB), [0]) == [1]
    [message] = caplog.messages
    assert message == "sampling on cpu by torch, which is slower: RuntimeError: Failed to find C compiler."


def tokens_of(sampler: DeviceSampler, logits: torch.Tensor, slots: list[int]) -> list[int]:
    tokens: list[int] = sampler.sample(logits, torch.tensor(slots, dtype=torch.int32)).tolist()
    return tokens


@pytest.mark.parametrize("mix", MIXES, ids=NAMES)
@pytest.mark.parametrize("scale", [3.0] if INTERPRETED else [0.1, 3.0])
def test_every_row_is_the_draw_of_the_reference(mix: dict[str, Any], scale: float) -> None:
    rows, params = ROWS, SamplingParams(**mix)
    prompt, output, forbidden = [1, 2, 3, 3], [4, 5, 5, 6], [7, 299]
    logits = draw_logits(rows, scale=scale)
    logits[:, 7] = 50.0
    sampler = device_sampler(rows)
    for row in range(rows):
        sampler.assign(row, params, 1000 + row, np.array(prompt), output, forbidden)
    for row, token in enumerate(tokens_of(sampler, logits, list(range(rows)))):
        p = probabilities(logits[row], params, prompt, output, forbidden)
        assert_is_the_draw(token, p, number_of(1000 + row, len(output)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_logits_of_every_type_are_sampled_as_they_are(dtype: torch.dtype) -> None:
    logits = draw_logits(ROWS).to(dtype)
    before = logits.clone()
    sampler, params = device_sampler(ROWS), SamplingParams(temperature=1.0, top_p=0.9, top_k=100)
    for row in range(ROWS):
        sampler.assign(row, params, row, NO_PROMPT, [], [])
    for row, token in enumerate(tokens_of(sampler, logits, list(range(ROWS)))):
        assert_is_the_draw(token, probabilities(logits[row].float(), params, [], [], []), number_of(row, 0))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "mix",
    [
        {"top_p": 0.97}, {"top_k": 8990}, {"min_p": 0.02}, {"top_k": 8000, "top_p": 0.8},
        {"top_p": 0.999, "min_p": 0.01}, {"top_k": 50, "min_p": 0.001}, {"top_k": 8500, "min_p": 0.3}, {},
        {"top_p": 0.5, "frequency_penalty": 1.0},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("steps", [4] if INTERPRETED else [0, 4])
def test_a_nucleus_wider_than_any_shortlist(mix: dict[str, Any], steps: int) -> None:
    vocab, rows, params = 9000, 1 if INTERPRETED else 4, SamplingParams(temperature=2.0, **mix)
    logits, sampler = draw_logits(rows, vocab, seed=3), device_sampler(rows, vocab)
    if steps:  # few different values
        logits = (logits * steps).round() / steps
    for row in range(rows):
        sampler.assign(row, params, row, NO_PROMPT, [1, 2], [5])
    for row, token in enumerate(tokens_of(sampler, logits, list(range(rows)))):
        assert_is_the_draw(token, probabilities(logits[row], params, [], [1, 2], [5]), number_of(row, 2))


@pytest.mark.parametrize("vocab", [1, 17, 4097] if INTERPRETED else [1, 2, 15, 17, 4096, 4097, 9000])
def test_vocabularies_that_no_block_divides(vocab: int) -> None:
    mixes: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 3.0, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 3},
    ]
    logits, sampler = draw_logits(4, vocab, seed=vocab), device_sampler(4, vocab)
    logits[:, vocab - 1] = 4.0
    for row, mix in enumerate(mixes):
        sampler.assign(row, SamplingParams(**mix), row, NO_PROMPT, [], [])
    for row, token in enumerate(tokens_of(sampler, logits, [0, 1, 2, 3])):
        assert_is_the_draw(
            token, probabilities(logits[row], SamplingParams(**mixes[row]), [], [], []), number_of(row, 0)
        )


def test_steps_move_on_and_penalties_follow_what_was_chosen() -> None:
    params = SamplingParams(
        temperature=1.0, frequency_penalty=0.7, presence_penalty=0.2, repetition_penalty=1.1, top_p=0.95
    )
    sampler, output, prompt = device_sampler(3), list[int](), [4, 5]
    sampler.assign(2, params, 11, np.array(prompt), [], [])
    for step in range(ROWS + 3):
        logits = draw_logits(1, seed=step, scale=0.5)
        p = probabilities(logits[0], params, prompt, output, [])
        [token] = tokens_of(sampler, logits, [2])
        assert_is_the_draw(token, p, number_of(11, step))
        assert int(sampler.slot_tokens[2]) == token
        output.append(token)
    sampler.assign(0, params, 11, np.array(prompt), output, [])
    logits = draw_logits(1, seed=99, scale=0.5)
    assert tokens_of(sampler, logits, [0]) == tokens_of(sampler, logits, [2])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    vocab, mixes = 5000, MIXES[1::3] if INTERPRETED else MIXES
    logits = draw_logits(len(mixes), vocab)

    def sample_in(order: list[int], together: bool) -> dict[int, int]:
        sampler = device_sampler(len(mixes), vocab)
        for slot, mix in enumerate(mixes):
            sampler.assign(slot, SamplingParams(**mix), slot, np.array([1, 2]), [3, 3], [8])
        batches = [order] if together else [[slot] for slot in order]
        return {s: t for batch in batches for s, t in zip(batch, tokens_of(sampler, logits[batch], batch), strict=True)}

    order = list(range(len(mixes)))
    assert sample_in(order, True) == sample_in(order[::-1], True) == sample_in(order, False)


def test_it_chooses_as_the_sampler_of_the_cpu_does_where_nothing_is_drawn() -> None:
    mixes: list[dict[str, Any]] = [
        {}, {"repetition_penalty": 1.3}, {"frequency_penalty": 0.5}, {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-9}, {"temperature": 1.0, "min_p": 1.0}, {"presence_penalty": -2.0},
    ]  # fmt: skip
    logits, sampler = draw_logits(len(mixes), scale=1.0), device_sampler(len(mixes))
    states = [SamplerState(SamplingParams(**mix, seed=5), np.array([1, 2]), [3, 3, 4]) for mix in mixes]
    for slot, state in enumerate(states):
        sampler.assign(slot, state.params, 5, np.array([1, 2]), [3, 3, 4], [])
    for _ in range(ROWS + 3):
        expected = sample(logits.numpy(), states).tolist()
        assert tokens_of(sampler, logits, list(range(len(mixes)))) == expected
        for state, token in zip(states, expected, strict=True):
            state.commit(token)


def test_equal_logits_give_the_first_token_when_greedy() -> None:
    sampler = device_sampler(1, 9000)
    logits = torch.zeros((1, 9000))
    assert tokens_of(sampler, logits, [0]) == [0]
    logits[0, [4500, 8999]] = 1.0
    assert tokens_of(sampler, logits, [0]) == [4500]


@pytest.mark.parametrize("mix", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.7}], ids=str)
def test_ties_at_the_edge_are_all_kept(mix: dict[str, Any]) -> None:
    seeds = [
        next(seed for seed in range(99) if abs(number_of(seed, 0) - middle) < 0.1)
        for middle in (0.12, 0.38, 0.62, 0.88)
    ]
    sampler, params = device_sampler(4, 5), SamplingParams(temperature=20.0, **mix)
    for row, seed in enumerate(seeds):
        sampler.assign(row, params, seed, NO_PROMPT, [], [])
    logits = torch.tensor([1.0, 3.0, 1.0, 1.0, -500.0]).expand(4, 5)
    assert tokens_of(sampler, logits, [0, 1, 2, 3]) == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_row_with_nan_or_infinity_gives_no_token_and_leaves_its_neighbours_alone(bad: float) -> None:
    for mix in MIXES[::4]:
        logits, samplers = draw_logits(3), [device_sampler(3), device_sampler(3)]
        for slot in range(3):
            for sampler in samplers:
                sampler.assign(slot, SamplingParams(**mix), slot, np.array([1]), [2], [4])
        good = tokens_of(samplers[0], logits, [0, 1, 2])
        logits[1, 200] = bad
        assert tokens_of(samplers[1], logits, [0, 1, 2]) == [good[0], NO_TOKEN, good[2]]
        assert samplers[1].slot_tokens.tolist()[:3] == [good[0], NO_TOKEN, good[2]]


def test_a_row_that_forbids_every_token_gives_no_token() -> None:
    sampler = device_sampler(2, 3)
    sampler.assign(0, SamplingParams(), 0, NO_PROMPT, [], [0, 1, 2])
    sampler.assign(1, SamplingParams(temperature=1.0, top_p=0.5), 0, NO_PROMPT, [], [0, 1, 2])
    assert tokens_of(sampler, torch.zeros((2, 3)), [0, 1]) == [NO_TOKEN, NO_TOKEN]
    assert tokens_of(device_sampler(1, 3), torch.full((1, 3), -torch.inf), [0]) == [NO_TOKEN]


def test_more_forbidden_tokens_than_a_record_had_room_for() -> None:
    sampler = device_sampler(2, 40)
    sampler.assign(0, SamplingParams(), 0, NO_PROMPT, [], [5])
    sampler.assign(1, SamplingParams(), 0, NO_PROMPT, [], list(range(30)))
    logits = torch.arange(40, 0, -1.0).expand(2, 40)
    assert tokens_of(sampler, logits, [0, 1]) == [0, 30]
    sampler.assign(1, SamplingParams(), 0, NO_PROMPT, [], [0])
    assert tokens_of(sampler, logits[:1], [1]) == [1], "what the slot forbade before is allowed again"


def test_a_slot_given_to_another_sequence_remembers_nothing() -> None:
    params, logits = SamplingParams(presence_penalty=2.0), torch.tensor([[2.0, 1.9, 0.0]])
    sampler = device_sampler(1, 3)
    sampler.assign(0, params, 0, NO_PROMPT, [], [])
    assert [tokens_of(sampler, logits, [0])[0] for _ in range(2)] == [0, 1]
    sampler.assign(0, SamplingParams(), 0, NO_PROMPT, [], [])
    assert [tokens_of(sampler, logits, [0])[0] for _ in range(2)] == [0, 0]
    sampler.assign(0, params, 0, NO_PROMPT, [], [])
    assert [tokens_of(sampler, logits, [0])[0] for _ in range(2)] == [0, 1]


def test_counts_take_no_memory_before_the_first_penalty_and_ignore_placeholders() -> None:
    sampler = device_sampler(4)
    sampler.assign(0, SamplingParams(temperature=1.0), 0, np.arange(9), [1], [2])
    assert sampler.memory < 4 * VOCAB
    sampler.assign(1, SamplingParams(repetition_penalty=2.0), 0, np.array([-1, 0, VOCAB, 10**9]), [VOCAB + 5], [])
    assert sampler.memory >= 5 * VOCAB * 2
    logits = torch.zeros((2, VOCAB))
    logits[:, :2] = torch.tensor([2.0, 1.5])
    assert tokens_of(sampler, logits[1:], [1]) == [1]


def test_padding_rows_share_the_scratch_slot() -> None:
    sampler = device_sampler(2)
    sampler.assign(1, SamplingParams(temperature=1.0), 3, NO_PROMPT, [], [])
    logits = draw_logits(3)
    token = tokens_of(sampler, logits, [1, 2, 2])[0]
    assert_is_the_draw(token, probabilities(logits[0], SamplingParams(temperature=1.0), [], [], []), number_of(3, 0))
    assert int(sampler.slot_tokens[1]) == token


def test_rows_of_a_wider_tensor_and_an_empty_batch() -> None:
    sampler, wide = device_sampler(3), draw_logits(6, VOCAB + 20)
    rows = wide[::2, 5 : VOCAB + 5]
    assert tokens_of(sampler, rows, [0, 1, 2]) == rows.argmax(1).tolist()
    assert tokens_of(sampler, rows[:0], []) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [[3, 1], [0, 1], [2]], ids=str)
@pytest.mark.parametrize("vocab", [101, 5000])
def test_a_mask_forbids_in_its_rows_alone(dtype: torch.dtype, rows: list[int], vocab: int) -> None:
    sampler, logits = device_sampler(4, vocab), draw_logits(4, vocab).to(dtype)
    wide = torch.nn.functional.pad(logits, (0, 8))
    masked, words = wide[:, :vocab], random_masks(len(rows), -(-vocab // 32) + 1)
    memory = sampler.mask_memory(*words.shape)
    memory.numpy()[:] = words
    sampler.constrain(masked, sampler.rows(rows), memory)
    allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)
    for row, bits in zip(rows, torch.from_numpy(allowed), strict=True):
        assert torch.equal(masked[row].isfinite(), bits)
        assert torch.equal(masked[row][bits], logits[row][bits])
    others = [row for row in range(4) if row not in rows]
    assert torch.equal(masked[others], logits[others])
    assert not wide[:, vocab:].any()


def random_masks(rows: int, words: int) -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(-(2**31), 2**31, (rows, words), dtype=np.int64).astype(np.int32)


def test_a_masked_row_draws_as_one_whose_logits_were_minus_infinity() -> None:
    logits, words, samplers = draw_logits(2), random_masks(2, 10), [device_sampler(2), device_sampler(2)]
    for sampler in samplers:
        for slot, mix in enumerate([MIXES[0], MIXES[5]]):
            sampler.assign(slot, SamplingParams(**mix), slot, NO_PROMPT, [], [])
    allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :VOCAB]
    expected = tokens_of(samplers[0], torch.where(torch.from_numpy(allowed) > 0, logits, -torch.inf), [0, 1])
    samplers[1].constrain(logits, samplers[1].rows([0, 1]), torch.from_numpy(words))
    assert tokens_of(samplers[1], logits, [0, 1]) == expected


def test_what_does_not_fit_is_refused() -> None:
    sampler = device_sampler(2)
    with pytest.raises(ValueError, match="for 1 slots of 300 tokens"):
        tokens_of(sampler, draw_logits(2), [0])
    with pytest.raises(ValueError, match="for 2 slots"):
        tokens_of(sampler, draw_logits(2).double(), [0, 1])
    with pytest.raises(ValueError, match="slot 2; there are 2"):
        sampler.assign(2, SamplingParams(), 0, NO_PROMPT, [], [])
    with pytest.raises(ValueError, match="0 slots"):
        DeviceSampler(0, VOCAB, CPU)
