"""States of linear attention: whose they are, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import psutil
import pytest

from engine.errors import InvalidConfig
from engine.runtime.state_memory import StateMemory
from engine.spec import DeltaNetSpec
from tests.runtime.cases import decode, prefill
from tests.runtime.conftest import PROMPT, Tiny, make_tiny

SPEC = DeltaNetSpec(layers=(0, 1, 3), key_heads=2, value_heads=4, key_dim=64, value_dim=64, kernel=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny("qwen3_5_text", tmp_path_factory)


def random_state(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SPEC.state_bytes // 4).astype(np.float32)


def test_a_row_reads_what_was_written_and_its_neighbours_do_not() -> None:
    memory = StateMemory(SPEC, rows=3)
    states = [random_state(row) for row in range(3)]
    for row, state in enumerate(states):
        memory.write(row, state)
    memory.clear(1)
    assert np.array_equal(memory.read(0), states[0])
    assert not memory.read(1).any()
    assert np.array_equal(memory.read(2), states[2])


def test_a_released_row_gives_its_pages_back_and_leaves_its_neighbours() -> None:
    rows = 256
    process = psutil.Process()
    memory = StateMemory(SPEC, rows)
    before = process.memory_info().rss
    for row in range(rows):
        memory.write(row, random_state(row))
    written = process.memory_info().rss
    assert written - before > rows * SPEC.state_bytes // 2
    for row in range(1, rows):
        memory.release(row)
    assert written - process.memory_info().rss > rows * SPEC.state_bytes // 2
    assert np.array_equal(memory.read(0), random_state(0))


def test_more_states_than_there_are_addresses_are_a_clear_error() -> None:
    with pytest.raises(InvalidConfig, match="lower max_batch_size"):
        StateMemory(replace(SPEC, value_heads=1 << 20), rows=1 << 20)


def test_a_row_starts_anew_whatever_was_in_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    case, decoder = tiny.case, tiny.decoder("fp32")
    fresh = prefill(decoder, 0, case, 0, 40)
    for kept_bytes in (1 << 30, 0):  # the row's pages are kept, or given back
        monkeypatch.setattr("engine.runtime.decoder._KEPT_BYTES", kept_bytes)
        prefill(decoder, 1, tiny.text_case(100, 13), 0, 100)
        decoder.release(1)
        assert np.array_equal(prefill(decoder, 1, case, 0, 40), fresh)
        assert np.array_equal(decoder.read_state(1), decoder.read_state(0))


def test_rows_between_those_that_decode_keep_their_states_to_the_bit(tiny: Tiny) -> None:
    case, decoder = tiny.case, tiny.decoder("fp32")
    for row in range(5):
        prefill(decoder, row, case, 0, 20 + row)
    kept = {row: decoder.read_state(row) for row in (1, 3)}
    moved = decoder.read_state(2)
    for step in range(3):
        decode(decoder, [(row, case, 20 + row + step) for row in (0, 2, 4)])
    for row, state in kept.items():
        assert np.array_equal(decoder.read_state(row), state)
    assert not np.array_equal(decoder.read_state(2), moved)


def test_a_chunk_of_one_token_goes_into_the_state_once(tiny: Tiny) -> None:
    case, decoder = tiny.case, tiny.decoder("fp32")
    prefill(decoder, 0, case, 0, PROMPT)
    prefill(decoder, 1, case, 0, PROMPT, chunk=1)
    assert np.array_equal(decoder.read_state(0), decoder.read_state(1))
