"""The KV budget and the prefix index."""

from __future__ import annotations

import numpy as np

from engine.scheduling.kv_cache import BLOCK, KVCache
from tests.scheduling.fakes import FakeMemory, blocks, image, sequence


def test_a_sequence_gets_the_lowest_row_and_blocks_for_its_tokens_and_the_next() -> None:
    kv = KVCache(FakeMemory(rows=2), blocks=10)
    first, second = sequence(1, BLOCK), sequence(2, 3)
    assert kv.admit(first)
    assert kv.admit(second)
    assert (first.row, second.row) == (0, 1)
    assert kv.used_blocks == 2 + 1
    kv.free(first)
    third = sequence(3, 3)
    assert kv.admit(third)
    assert third.row == 0


def test_without_a_row_or_without_blocks_a_sequence_waits() -> None:
    kv = KVCache(FakeMemory(rows=1), blocks=2)
    assert not kv.admit(sequence(1, 2 * BLOCK))
    assert kv.admit(sequence(2, BLOCK))
    assert not kv.admit(sequence(3, 1))


def test_growing_takes_a_block_only_when_one_is_full() -> None:
    kv = KVCache(FakeMemory(rows=2), blocks=2)
    one, other = sequence(1, BLOCK - 1), sequence(2, BLOCK - 1)
    assert kv.admit(one)
    assert kv.admit(other)
    assert kv.grow(one)
    assert kv.used_blocks == 2
    one.output.append(7)
    assert not kv.grow(one)
    kv.free(other)
    assert kv.grow(one)


def test_a_known_prefix_is_copied_in_up_to_the_token_before_the_last() -> None:
    memory = FakeMemory(rows=2)
    kv = KVCache(memory, blocks=100)
    first = sequence(1, list(range(1, 3 * BLOCK + 1)))
    assert kv.admit(first)
    memory.compute(first, first.length)
    kv.store(first)
    same = sequence(2, list(range(1, 3 * BLOCK + 1)))
    assert kv.admit(same)
    assert same.computed == same.reused == 2 * BLOCK  # not all three: the last token's logits are needed
    assert same.row is not None
    assert np.array_equal(memory.data[same.row, : 2 * BLOCK], np.arange(1, 2 * BLOCK + 1))


def test_a_prefix_ends_where_the_tokens_differ() -> None:
    memory = FakeMemory(rows=2)
    kv = KVCache(memory, blocks=100)
    first = sequence(1, [5] * (4 * BLOCK))
    assert kv.admit(first)
    memory.compute(first, first.length)
    kv.store(first)
    other = sequence(2, [5] * (BLOCK + 3) + [6] * (2 * BLOCK))
    assert kv.admit(other)
    assert other.computed == BLOCK


def test_the_same_placeholders_for_another_image_are_another_prefix() -> None:
    memory = FakeMemory(rows=3)
    kv = KVCache(memory, blocks=100)
    first = sequence(1, [9] * (3 * BLOCK), [(2, image(b"cat", 2 * BLOCK))])
    assert kv.admit(first)
    memory.compute(first, first.length)
    kv.store(first)
    same = sequence(2, [9] * (3 * BLOCK), [(2, image(b"cat", 2 * BLOCK))])
    other = sequence(3, [9] * (3 * BLOCK), [(2, image(b"dog", 2 * BLOCK))])
    assert kv.admit(same)
    assert kv.admit(other)
    assert same.computed == 2 * BLOCK
    assert other.computed == 0


def test_an_image_that_starts_elsewhere_is_another_prefix() -> None:
    memory = FakeMemory(rows=2)
    kv = KVCache(memory, blocks=100)
    first = sequence(1, [9] * (3 * BLOCK), [(2, image(b"cat", BLOCK))])
    assert kv.admit(first)
    memory.compute(first, first.length)
    kv.store(first)
    shifted = sequence(2, [9] * (3 * BLOCK), [(3, image(b"cat", BLOCK))])
    assert kv.admit(shifted)
    assert shifted.computed == 0


def test_the_index_gives_way_to_running_sequences_and_forgets_the_end_of_a_chain_first() -> None:
    memory = FakeMemory(rows=2)
    kv = KVCache(memory, blocks=8)
    first = sequence(1, list(range(4 * BLOCK)))
    assert kv.admit(first)
    memory.compute(first, first.length)
    kv.store(first)
    assert kv.indexed_blocks == 3  # 5 of 8 are the sequence's own
    kv.free(first)
    assert kv.admit(sequence(2, 6 * BLOCK - 1))
    assert kv.used_blocks + kv.indexed_blocks <= 8
    again = sequence(3, list(range(4 * BLOCK)))
    assert not kv.admit(again)
    assert kv.indexed_blocks == 2


def test_used_and_indexed_blocks_never_exceed_the_budget() -> None:
    random = np.random.default_rng(0)
    memory = FakeMemory(rows=8)
    kv = KVCache(memory, blocks=40)
    running = []
    for number in range(300):
        one = sequence(number, [int(random.integers(3))] * int(random.integers(1, 8 * BLOCK)))
        if kv.admit(one):
            memory.compute(one, one.length)
            kv.store(one)
            running.append(one)
        if running and random.random() < 0.6:
            kv.free(running.pop(int(random.integers(len(running)))))
        assert kv.used_blocks + kv.indexed_blocks <= 40
        assert kv.used_blocks == sum(blocks(one.length + 1) for one in running)


def test_what_a_step_under_way_computes_is_not_stored() -> None:
    memory = FakeMemory(rows=1)
    kv = KVCache(memory, blocks=100)
    growing = sequence(1, 2 * BLOCK - 1)
    assert kv.admit(growing)
    memory.compute(growing, growing.length)
    growing.output.append(7)
    growing.computed, growing.pending = 2 * BLOCK, 1
    kv.store(growing)
    assert kv.indexed_blocks == 1


def test_without_reuse_nothing_is_indexed() -> None:
    memory = FakeMemory(rows=1)
    kv = KVCache(memory, blocks=10, reuse=False)
    one = sequence(1, 2 * BLOCK)
    assert kv.admit(one)
    memory.compute(one, one.length)
    kv.store(one)
    assert kv.indexed_blocks == 0
