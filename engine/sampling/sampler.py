"""Batched sampling in numpy.

Order of operations as in vLLM (vllm/v1/sample/sampler.py): repetition, frequency and presence penalties, temperature,
min-p, top-k, top-p, draw. Rows never mix: reductions run along a row only, and the random number of a row is a function
of its seed and step alone, so a row gives the same token alone and in any batch, bit by bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.sampling.philox import uniforms
from engine.sampling.state import SamplerState
from engine.sampling.truncation import GROUP, cutoffs

NO_TOKEN = -1
CHUNK_ELEMENTS = 1 << 18  # logits worked on at a time: 1 MiB stays in the core's cache
MIN_TEMPERATURE = 1e-5  # below it the quotient may overflow; the distribution is a single token long before

_local = threading.local()


def sample(logits: NDArray[np.float32], states: Sequence[SamplerState]) -> NDArray[np.int64]:
    """One token id per row of logits [B, V] (left as they are), by the state of that row; [B].

    Minus infinity forbids a token. A row that holds a NaN, whose maximum is infinite, or that forbids every token gives
    NO_TOKEN (-1), and its neighbours are not affected. States change only by `commit`.
    """
    if logits.ndim != 2 or len(logits) != len(states):
        raise ValueError(f"logits of shape {logits.shape} for {len(states)} sequences")
    if not len(states):
        return np.empty(0, np.int64)
    tokens, peaks = _best(logits)
    tokens[~np.isfinite(peaks)] = NO_TOKEN
    rest = [row for row, state in enumerate(states) if tokens[row] != NO_TOKEN and not _is_plain(state)]
    for rows in _chunks(rest, logits.shape[1]):
        tokens[rows] = _sample_rows(logits, rows, [states[row] for row in rows])
    return tokens


def _is_plain(state: SamplerState) -> bool:
    return state.params.is_greedy and not state.params.has_penalties


def _chunks(rows: list[int], vocab: int) -> Iterator[list[int]]:
    step = max(1, CHUNK_ELEMENTS // vocab)
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _best(logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The first largest token of each row and its logit, NaN if the row has one (argmax stops at it)."""
    tokens = np.argmax(logits, axis=1).astype(np.int64)
    # A flat index, because numpy lets go of the interpreter for one of two axes, and under load waits to get it back.
    return tokens, logits.reshape(-1)[tokens + np.arange(len(logits)) * logits.shape[1]]


def _scratch(rows: int, width: int) -> NDArray[np.float32]:
    """An uninitialised array, this thread's own: fresh pages for every row would cost more than the math."""
    size = rows * width
    if not hasattr(_local, "buffer") or len(_local.buffer) < size:
        _local.buffer = np.empty(size, np.float32)
    buffer: NDArray[np.float32] = _local.buffer
    return buffer[:size].reshape(rows, width)


def _sample_rows(logits: NDArray[np.float32], rows: list[int], states: list[SamplerState]) -> NDArray[np.int64]:
    """Tokens [n] of rows that need more than the argmax."""
    vocab = logits.shape[1]
    work = _scratch(len(rows), -(-vocab // GROUP) * GROUP)
    work[:, vocab:] = -np.inf
    for slot, row in enumerate(rows):
        work[slot, :vocab] = logits[row]
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found by the check of the maxima
        _penalise(work, states)
        tokens, peaks = _best(work)
        tokens[~np.isfinite(peaks)] = NO_TOKEN
        drawn = [row for row, state in enumerate(states) if tokens[row] != NO_TOKEN and not state.params.is_greedy]
        if drawn:
            chosen = [states[row] for row in drawn]
            heat = np.array([max(state.params.temperature, MIN_TEMPERATURE) for state in chosen], np.float32)
            z = work[drawn] if len(drawn) < len(work) else work
            z -= peaks[drawn, None]
            z /= heat[:, None]
            tokens[drawn] = _draw(z, chosen)
    return tokens


def _penalise(work: NDArray[np.float32], states: list[SamplerState]) -> None:
    """Apply repetition, frequency and presence penalties to work [n, W], in place, at the tokens seen so far."""
    seen = [(row, *state.seen, state.params) for row, state in enumerate(states) if state.params.has_penalties]
    if not seen:
        return
    sizes = [len(tokens) for _, tokens, _, _ in seen]
    rows = np.repeat([row for row, _, _, _ in seen], sizes)
    columns = np.concatenate([tokens for _, tokens, _, _ in seen])
    counts = np.concatenate([count for _, _, count, _ in seen])
    repetition, frequency, presence = (
        np.repeat(np.array([getattr(params, f"{name}_penalty") for *_, params in seen], np.float32), sizes)
        for name in ("repetition", "frequency", "presence")
    )
    values = work[rows, columns]
    values = np.where(values > 0, values / repetition, values * repetition)
    work[rows, columns] = values - frequency * counts - presence * (counts > 0)


def _draw(z: NDArray[np.float32], states: list[SamplerState]) -> NDArray[np.int64]:
    """Draw a token from each row of scaled logits z [n, W] (maximum 0, -inf after the vocabulary), overwriting z.

    By inverse CDF: the row is summed in groups of columns that lie W / GROUP apart, the group is found in the sums, the
    token in the group: one pass instead of a running sum over the vocabulary.
    """
    cuts = cutoffs(z, [state.params for state in states])
    kept = z >= cuts[:, None]
    weights = np.exp(z, out=z)
    weights *= kept
    groups = weights.reshape(len(z), GROUP, -1)
    sums = groups.sum(axis=1)
    numbers = uniforms(
        np.array([state.seed for state in states], np.uint64), np.array([state.step for state in states], np.uint64)
    )
    group, left = _invert(sums, numbers)
    index, _ = _invert(groups[np.arange(len(z)), :, group], left)
    tokens: NDArray[np.int64] = index * sums.shape[1] + group
    return tokens


def _invert(
    weights: NDArray[np.float32], numbers: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For numbers [n] of [0, 1) the column of weights [n, m] in which each falls, and where in it, again in [0, 1).

    A column without weight is never found: its running sum equals that of the column before, and the goal stays below
    the total.
    """
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    goal = np.minimum(numbers * cumulative[:, -1], np.nextafter(cumulative[:, -1], 0.0))
    index = np.argmax(cumulative > goal[:, None], axis=1)
    every = np.arange(len(weights))
    weight = weights[every, index].astype(np.float64)
    inside = (goal - (cumulative[every, index] - weight)) / weight
    return index, np.clip(inside, 0.0, 1.0)
