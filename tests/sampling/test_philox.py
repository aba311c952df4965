"""Known answers from the authors' Random123 distribution (kat_vectors, philox4x32 10)."""

from __future__ import annotations

import numpy as np
import pytest

from engine.sampling.philox import philox4x32, uniforms

ONES = 0xFFFFFFFF
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_it_is_philox(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox4x32(np.array(counter, np.uint64)[:, None], np.array(key, np.uint64)[:, None])
    assert words[:, 0].tolist() == expected


def test_numbers_are_uniform_over_seeds_and_over_steps() -> None:
    counts = np.arange(20_000, dtype=np.uint64)
    same = np.full_like(counts, 2**63 - 1)
    for numbers in (uniforms(counts, same), uniforms(same, counts)):
        assert numbers.min() >= 0.0
        assert numbers.max() < 1.0
        cells = np.bincount((numbers * 100).astype(int), minlength=100)
        assert ((cells - 200.0) ** 2 / 200.0).sum() < 99 + 5 * np.sqrt(2 * 99)
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_all_bits_of_a_seed_count() -> None:
    seeds = np.array([0, *(1 << bit for bit in range(64))], np.uint64)
    assert len(set(uniforms(seeds, np.zeros_like(seeds)).tolist())) == 65
