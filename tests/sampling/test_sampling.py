"""Tokens compared with a plain float64 reference, row by row, and properties that a batch must not change."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.request import SamplingParams
from engine.sampling import NO_TOKEN, SamplerState, sample
from engine.sampling.truncation import GROUP, cutoffs

Logits = NDArray[np.float32]
NO_PROMPT = np.empty(0, np.int64)
MIXES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 2.0, "frequency_penalty": 1.0, "top_p": 0.95},
]


def draw_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Logits:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32)


def reference(logits: Logits, params: SamplingParams, prompt: list[int], output: list[int]) -> NDArray[np.float64]:
    """Probabilities of the next token, computed the slow and obvious way."""
    x = logits.astype(np.float64)
    for token in set(prompt) | set(output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.temperature == 0.0:
        one_hot = np.zeros_like(x)
        one_hot[np.argmax(x)] = 1.0
        return one_hot
    x /= params.temperature
    p = np.exp(x - x.max())
    p[p < params.min_p * p.max()] = 0.0
    if 0 < params.top_k < len(p):
        p[p < np.sort(p)[-params.top_k]] = 0.0
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    if params.top_p < 1.0:
        p[order[before >= params.top_p * p.sum()]] = 0.0
    normalised: NDArray[np.float64] = p / p.sum()
    return normalised


def frequencies(logits: Logits, params: SamplingParams, draws: int, prompt: list[int], output: list[int]) -> Any:
    states = [
        SamplerState(SamplingParams(**{**_fields(params), "seed": seed}), np.array(prompt, np.int64), output)
        for seed in range(draws)
    ]
    tokens = sample(np.broadcast_to(logits, (draws, len(logits))), states)
    return np.bincount(tokens, minlength=len(logits))


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}


@pytest.mark.parametrize("vocab", [40, 3000])
@pytest.mark.parametrize("mix", MIXES, ids=[",".join(mix) or "greedy" for mix in MIXES])
def test_frequencies_match_the_reference_probabilities(mix: dict[str, Any], vocab: int) -> None:
    logits, params = draw_logits(1, vocab)[0], SamplingParams(**mix)
    prompt, output = [1, 2, 3, 3], [4, 5, 5, int(np.argmax(logits))]
    expected = reference(logits, params, prompt, output)
    draws = 4000
    counts = frequencies(logits, params, draws, prompt, output)
    assert not counts[expected == 0].any(), "a token that was filtered out"
    likely = expected * draws >= 5
    rest = draws * expected[~likely].sum()
    cells = np.append(counts[likely], counts[~likely].sum() if rest > 0 else 0.0)
    wanted = np.append(draws * expected[likely], max(rest, 1e-9))
    chi_square = float(((cells - wanted) ** 2 / wanted).sum())
    freedom = len(cells) - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("vocab", [1, 2, 63, 300, 5000, 40_000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_the_kept_set_is_that_of_the_reference(vocab: int, scale: float) -> None:
    logits = draw_logits(1, vocab, seed=vocab, scale=scale)
    for mix in (
        {"top_k": 1}, {"top_k": 7}, {"top_k": 700}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_p": 1e-9},
        {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 50, "top_p": 0.7}, {"min_p": 0.02, "top_p": 0.8, "top_k": 3000},
    ):  # fmt: skip
        params = SamplingParams(temperature=1.0, **mix)
        z = np.full((1, -(-vocab // GROUP) * GROUP), -np.inf, np.float32)
        z[0, :vocab] = logits[0] - logits[0].max()
        kept = z[0, :vocab] >= cutoffs(z, [params])[0]
        expected = reference(z[0, :vocab], params, [], []) > 0
        # rounding may move the edge of a nucleus by a token of negligible weight, never by more
        p = np.exp(z[0, :vocab].astype(np.float64))
        assert p[kept != expected].sum() <= 2e-6 * p.sum(), mix
        assert abs(int(kept.sum()) - int(expected.sum())) <= 1 + vocab // 2000, mix


def test_rows_are_bit_by_bit_independent_of_their_batch() -> None:
    for vocab in (300, 6000):
        states = [_seeded(MIXES[i % len(MIXES)], seed=i) for i in range(24)]
        logits = draw_logits(24, vocab)
        together = sample(logits, states)
        alone = [sample(logits[i : i + 1], [state])[0] for i, state in enumerate(states)]
        backwards = sample(logits[::-1], states[::-1])[::-1]
        assert together.tolist() == alone == backwards.tolist()


def test_the_cut_off_and_the_sums_of_a_row_have_the_same_bits_alone_and_in_a_batch() -> None:
    for width in (320, 6400):
        z = draw_logits(16, width)
        z -= z.max(axis=1, keepdims=True)
        params = [SamplingParams(**{**MIXES[1 + i % 7], "temperature": 1.0}) for i in range(16)]
        cuts = cutoffs(z, params)
        sums = np.exp(z).reshape(16, 64, -1).sum(axis=1)
        for i in range(16):
            assert cutoffs(z[i : i + 1].copy(), params[i : i + 1]).tobytes() == cuts[i : i + 1].tobytes()
            assert np.exp(z[i : i + 1]).reshape(1, 64, -1).sum(axis=1).tobytes() == sums[i].tobytes()


def _seeded(mix: dict[str, Any], seed: int) -> SamplerState:
    return SamplerState(SamplingParams(**mix, seed=seed), np.array([1, 2, 3]), [7, 8, 8])


def _generate(state: SamplerState, steps: int, vocab: int = 300) -> list[int]:
    tokens = []
    for step in range(steps):
        token = int(sample(draw_logits(1, vocab, seed=step, scale=0.5), [state])[0])
        state.commit(token)
        tokens.append(token)
    return tokens


def test_a_seed_repeats_a_stream_and_another_seed_gives_another() -> None:
    mix = {"temperature": 1.0, "frequency_penalty": 0.3}
    first, again, other = (_generate(_seeded(mix, seed), 30) for seed in (5, 5, 6))
    assert first == again != other


def test_without_a_seed_every_state_draws_its_own() -> None:
    params = SamplingParams(temperature=1.0)
    assert _generate(SamplerState(params, NO_PROMPT), 20) != _generate(SamplerState(params, NO_PROMPT), 20)


def test_sampling_again_before_the_commit_gives_the_same_token() -> None:
    state, logits = _seeded({"temperature": 1.0}, 3), draw_logits(1, 300)
    assert sample(logits, [state]).tolist() == sample(logits, [state]).tolist()


def test_a_state_restored_from_its_output_continues_the_stream() -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5, seed=11)
    prompt = np.array([4, 5])
    tokens = _generate(SamplerState(params, prompt), 60)
    for cut in (1, 17, 59):
        restored = SamplerState(params, prompt, tokens[:cut])
        assert sample(draw_logits(1, 300, seed=cut, scale=0.5), [restored])[0] == tokens[cut]


def test_logits_are_left_as_they_are_even_read_only_and_not_contiguous() -> None:
    wide = draw_logits(len(MIXES), 600)
    logits = wide[:, ::2]
    before = logits.copy()
    wide.flags.writeable = False
    states = [_seeded(mix, 1) for mix in MIXES]
    assert sample(logits, states).tolist() == sample(before, states).tolist()
    assert np.array_equal(logits, before)


def test_equal_logits_give_the_first_token_when_greedy() -> None:
    assert sample(np.zeros((2, 9), np.float32), [_seeded({}, 0), _seeded({"temperature": 0.0}, 1)]).tolist() == [0, 0]


def test_ties_at_the_edge_of_top_k_are_all_kept() -> None:
    logits = np.array([3.0, 1.0, 1.0, 1.0, -5.0], np.float32)
    counts = frequencies(logits, SamplingParams(temperature=2.0, top_k=2), 2000, [], [])
    assert counts[:4].all()
    assert not counts[4]


@pytest.mark.parametrize(
    "mix",
    [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_k": 1, "top_p": 0.5, "min_p": 0.5}, {}],
    ids=["top_k 1", "tiny top_p", "min_p 1", "all", "tiny temperature"],
)
def test_the_strictest_filters_leave_the_likeliest_token(mix: dict[str, Any]) -> None:
    logits = draw_logits(50, 300)
    states = [_seeded({"temperature": 1.0 if mix else 1e-30, **mix}, seed) for seed in range(50)]
    assert sample(logits, states).tolist() == logits.argmax(axis=1).tolist()


def test_top_k_over_the_vocabulary_changes_nothing() -> None:
    logits = draw_logits(40, 300)
    plain = [_seeded({"temperature": 1.5}, seed) for seed in range(40)]
    wide = [_seeded({"temperature": 1.5, "top_k": top_k}, seed) for seed, top_k in enumerate([300, 10**9] * 20)]
    assert sample(logits, plain).tolist() == sample(logits, wide).tolist()


def test_a_vocabulary_of_one_token() -> None:
    states = [_seeded(mix, 0) for mix in MIXES[:5]]
    states = [SamplerState(state.params, NO_PROMPT) for state in states]
    assert sample(np.zeros((5, 1), np.float32), states).tolist() == [0] * 5


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.full((64, 5000), -np.inf, np.float32)
    logits[:, [17, 4999]] = 0.0
    states = [_seeded({"temperature": 5.0, "top_p": 0.99 if seed % 2 else 1.0}, seed) for seed in range(64)]
    assert set(sample(logits, states).tolist()) == {17, 4999}


def test_a_penalty_moves_a_greedy_choice_on() -> None:
    logits = np.array([[2.0, 1.9, -1.0]], np.float32)
    state = SamplerState(SamplingParams(repetition_penalty=1.2), np.array([0]))
    assert sample(logits, [state])[0] == 1
    state = SamplerState(SamplingParams(frequency_penalty=0.06), NO_PROMPT)
    tokens = []
    for _ in range(4):
        tokens.append(int(sample(logits, [state])[0]))
        state.commit(tokens[-1])
    assert tokens == [0, 0, 1, 0]


def test_presence_and_frequency_leave_prompt_tokens_alone() -> None:
    logits = np.array([[2.0, 1.9]], np.float32)
    params = SamplingParams(presence_penalty=2.0, frequency_penalty=2.0)
    assert sample(logits, [SamplerState(params, np.array([0, 0]))])[0] == 0
    assert sample(logits, [SamplerState(params, NO_PROMPT, [0])])[0] == 1


def test_many_different_output_tokens_are_all_penalised() -> None:
    params = SamplingParams(presence_penalty=2.0)
    state = SamplerState(params, NO_PROMPT, range(99))
    assert sample(np.zeros((1, 100), np.float32), [state])[0] == 99


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=[",".join(mix) or "greedy" for mix in MIXES])
def test_a_row_with_nan_or_infinity_gives_no_token_and_leaves_its_neighbours_alone(
    mix: dict[str, Any], bad: float
) -> None:
    logits = draw_logits(3, 300)
    states = [_seeded(mix, seed) for seed in range(3)]
    good = sample(logits, states)
    logits[1, 200] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample(logits, states).tolist() == [good[0], NO_TOKEN, good[2]]


def test_a_row_that_forbids_every_token_gives_no_token() -> None:
    logits = np.full((2, 10), -np.inf, np.float32)
    assert sample(logits, [_seeded({}, 0), _seeded({"temperature": 1.0}, 0)]).tolist() == [NO_TOKEN, NO_TOKEN]


def test_an_empty_batch_is_fine_and_a_wrong_one_is_not() -> None:
    assert sample(np.empty((0, 300), np.float32), []).tolist() == []
    with pytest.raises(ValueError, match="for 1 sequences"):
        sample(np.zeros((2, 300), np.float32), [_seeded({}, 0)])
