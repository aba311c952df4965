"""Counter-based random numbers: a pure function of seed and step, so that no draw depends on another sequence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
ROUNDS = 10


def philox4x32(counters: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10 of counters [4, n] and keys [2, n] (32-bit words in uint64), elementwise over n: [4, n].

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    even, odd, keys = counters[0::2], counters[1::2], keys.copy()
    for _ in range(ROUNDS):
        product = even * _MULTIPLIERS
        even = (product[::-1] >> _HALF) ^ odd ^ keys
        odd = product[::-1] & _LOW
        keys = (keys + _KEY_STEPS) & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(seeds: NDArray[np.uint64], steps: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number of [0, 1) with 53 random bits for each pair of seed [n] and step [n]."""
    zeros = np.zeros_like(seeds)
    counters = np.stack([steps & _LOW, steps >> _HALF, zeros, zeros])
    words = philox4x32(counters, np.stack([seeds & _LOW, seeds >> _HALF]))
    bits = (words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))
    result: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return result
