"""The record of one slot of the device sampler: 32-bit words in the order of `Word`, then the forbidden tokens.

A record crosses to the device in one copy; the kernels and the torch path read the same words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from engine.request import SamplingParams
from engine.sampling.sampler import MIN_TEMPERATURE

DRAWN, PENALISED = 1, 2  # bits of Word.FLAGS
IN_PROMPT = 1 << 14  # bit of a count for a token of the prompt; below it the times the token is in the output
MOST_SEEN = IN_PROMPT - 1  # counts stay here: the frequency penalty of so many repeats has long decided


class Word(IntEnum):
    """Places in a record. SCALE to PRESENCE hold float32 bits, the others integers.

    SCALE is log2(e) / temperature: a token with logit x has weight 2 ** -d with d = (peak - x) * SCALE.
    LIMIT is the largest d that min-p keeps; TOP_K 0 switches top-k off. SEED takes two words, low first.
    """

    SCALE = 0
    LIMIT = 1
    TOP_P = 2
    REPETITION = 3
    FREQUENCY = 4
    PRESENCE = 5
    TOP_K = 6
    FLAGS = 7
    SEED = 8
    STEP = 10
    FORBIDDEN = 11  # how many


FIRST_FORBIDDEN = Word.FORBIDDEN + 1


def write_record(
    words: NDArray[np.int32], params: SamplingParams, vocab: int, seed: int, step: int, forbidden: Sequence[int]
) -> None:
    """Fill words [at least FIRST_FORBIDDEN + len(forbidden)] for a vocabulary of `vocab` tokens."""
    reals = words.view(np.float32)
    reals[Word.SCALE] = math.log2(math.e) / max(params.temperature, MIN_TEMPERATURE)
    # 0.0 - x, for -0.0 would not be ordered by its bits
    reals[Word.LIMIT] = 0.0 - math.log2(params.min_p) if params.min_p > 0.0 else math.inf
    reals[Word.TOP_P] = params.top_p
    reals[Word.REPETITION] = params.repetition_penalty
    reals[Word.FREQUENCY] = params.frequency_penalty
    reals[Word.PRESENCE] = params.presence_penalty
    words[Word.TOP_K] = params.top_k if params.top_k < vocab else 0
    words[Word.FLAGS] = DRAWN * (not params.is_greedy) | PENALISED * params.has_penalties
    words.view(np.uint32)[Word.SEED : Word.SEED + 2] = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    words[Word.STEP] = step
    words[Word.FORBIDDEN] = len(forbidden)
    words[FIRST_FORBIDDEN : FIRST_FORBIDDEN + len(forbidden)] = forbidden


def seen_tokens(
    params: SamplingParams, prompt: NDArray[np.int64], output: Sequence[int], vocab: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """What penalties look at: tokens of the prompt [n], those of the output once [m], how often these are in it [m].

    The prompt's only if a penalty looks at them. Ids outside the vocabulary (placeholders) are left out.
    """
    given = np.asarray(prompt, np.int64) if params.repetition_penalty != 1.0 else np.empty(0, np.int64)
    chosen, times = np.unique(np.asarray(output, np.int64), return_counts=True)
    known = (chosen >= 0) & (chosen < vocab)
    return given[(given >= 0) & (given < vocab)], chosen[known], np.minimum(times[known], MOST_SEEN)
