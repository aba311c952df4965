"""Blocks on a device: who has which, who shares, who is found again."""

from __future__ import annotations

import numpy as np
import pytest

from engine.scheduling.paged import PagedKVCache
from engine.scheduling.sequence import Sequence
from tests.scheduling.fakes import image, sequence

SIZE = 4


def cache(blocks: int = 20, slots: int = 4, context_length: int = 80) -> PagedKVCache:
    return PagedKVCache(slots=slots, blocks=blocks, block_size=SIZE, context_length=context_length)


def admitted(kv: PagedKVCache, one: Sequence) -> Sequence:
    assert kv.admit(one)
    return one


def computed(kv: PagedKVCache, one: Sequence) -> Sequence:
    """Admitted, computed to its end and findable."""
    admitted(kv, one)
    one.computed = one.length
    kv.store(one)
    return one


def blocks_of(kv: PagedKVCache, one: Sequence) -> list[int]:
    assert one.row is not None
    return [block for block in kv.tables[one.row].tolist() if block]


def test_a_sequence_gets_the_lowest_slot_and_blocks_for_its_tokens_and_the_next() -> None:
    kv = cache()
    first, second = admitted(kv, sequence(1, SIZE)), admitted(kv, sequence(2, SIZE - 1))
    assert (first.row, second.row) == (0, 1)
    assert [len(blocks_of(kv, one)) for one in (first, second)] == [2, 1]
    assert kv.used_blocks == 3
    kv.free(first)
    assert admitted(kv, sequence(3, 1)).row == 0


def test_a_slot_that_is_free_points_to_block_0() -> None:
    kv = cache()
    one = admitted(kv, sequence(1, 3 * SIZE))
    assert kv.tables[0].any()
    kv.free(one)
    assert not kv.tables.any()
    kv.free(one)
    assert kv.used_blocks == 0


@pytest.mark.parametrize(("slots", "blocks"), [(1, 20), (4, 3)])
def test_without_a_slot_or_blocks_a_sequence_waits_and_changes_nothing(slots: int, blocks: int) -> None:
    kv = cache(blocks, slots)
    admitted(kv, sequence(1, SIZE))
    before = kv.tables.copy()
    waiting = sequence(2, SIZE)
    assert not kv.admit(waiting)
    assert waiting.row is None
    assert np.array_equal(kv.tables, before)
    assert kv.used_blocks == 2


def test_block_0_is_never_handed_out() -> None:
    kv = cache(blocks=3)
    one = admitted(kv, sequence(1, 3 * SIZE - 1))
    assert sorted(blocks_of(kv, one)) == [1, 2, 3]
    assert kv.capacity == 3 * SIZE


def test_growing_takes_a_block_when_one_is_full_until_none_is_left() -> None:
    kv = cache(blocks=2)
    one = admitted(kv, sequence(1, SIZE - 1))
    assert kv.grow(one)
    assert kv.used_blocks == 1
    one.pending += 1  # a token that nobody has read yet needs its place as well
    assert kv.grow(one)
    assert kv.used_blocks == 2
    one.output = [7] * SIZE
    assert not kv.grow(one)


def test_a_known_prefix_is_shared_up_to_the_token_before_the_last() -> None:
    kv = cache()
    first = computed(kv, sequence(1, list(range(3 * SIZE))))
    second = admitted(kv, sequence(2, list(range(3 * SIZE))))
    assert second.computed == second.reused == 2 * SIZE
    assert second.prefill_end == 3 * SIZE
    assert blocks_of(kv, first)[:2] == blocks_of(kv, second)[:2]
    assert not set(blocks_of(kv, first)[2:]) & set(blocks_of(kv, second)[2:])
    assert kv.used_blocks == 4 + 2


def test_a_shared_block_stays_until_its_last_user_leaves() -> None:
    kv = cache(blocks=5)
    first = computed(kv, sequence(1, list(range(2 * SIZE))))
    second = admitted(kv, sequence(2, list(range(2 * SIZE))))
    shared = blocks_of(kv, second)[0]
    kv.free(first)
    assert blocks_of(kv, second)[0] == shared
    other = admitted(kv, sequence(3, 2 * SIZE - 1))  # takes the blocks that were left
    assert shared not in blocks_of(kv, other)
    kv.free(second)
    assert admitted(kv, sequence(4, list(range(2 * SIZE)))).computed in (0, SIZE)


def test_output_is_findable_as_far_as_it_is_known_and_computed() -> None:
    kv = cache()
    one = admitted(kv, sequence(1, [1, 2, 3]))
    one.output, one.pending, one.computed = [4, 5, 6, 7], 1, 8  # the eighth token is computed and not known
    kv.free(one)
    assert kv.indexed_blocks == 1
    assert admitted(kv, sequence(2, [1, 2, 3, 4, 5, 6, 7, 8, 9])).computed == SIZE


def test_what_was_not_computed_is_not_findable() -> None:
    kv = cache()
    one = admitted(kv, sequence(1, list(range(3 * SIZE))))
    one.computed = 2 * SIZE - 1
    kv.free(one)
    assert kv.indexed_blocks == 1
    assert admitted(kv, sequence(2, list(range(3 * SIZE)))).computed == SIZE


def test_two_that_compute_the_same_at_once_leave_one_copy() -> None:
    kv = cache(blocks=8)
    first, second = (admitted(kv, sequence(number, list(range(2 * SIZE)))) for number in (1, 2))
    for one in (first, second):
        one.computed = one.length
        kv.store(one)
    assert kv.indexed_blocks == 2
    kept = blocks_of(kv, first)[:2]
    for one in (first, second):
        kv.free(one)
    assert kv.indexed_blocks == 2
    assert kv.used_blocks == 0
    assert blocks_of(kv, admitted(kv, sequence(3, [*range(2 * SIZE), 99])))[:2] == kept


def test_the_same_placeholders_for_another_image_are_another_prefix() -> None:
    kv = cache()
    computed(kv, sequence(1, [9] * (3 * SIZE), [(2, image(b"cat", 2 * SIZE))]))
    same = admitted(kv, sequence(2, [9] * (3 * SIZE), [(2, image(b"cat", 2 * SIZE))]))
    other = admitted(kv, sequence(3, [9] * (3 * SIZE), [(2, image(b"dog", 2 * SIZE))]))
    shifted = admitted(kv, sequence(4, [9] * (3 * SIZE), [(3, image(b"cat", 2 * SIZE))]))
    assert [one.computed for one in (same, other, shifted)] == [2 * SIZE, 0, 0]


def test_what_was_idle_longest_goes_first_and_a_chain_loses_its_end() -> None:
    kv = cache(blocks=8)
    old = computed(kv, sequence(1, list(range(100, 100 + 2 * SIZE))))
    new = computed(kv, sequence(2, list(range(200, 200 + 2 * SIZE))))
    kv.free(old)
    kv.free(new)
    assert kv.indexed_blocks == 4
    kv.free(admitted(kv, sequence(3, 5 * SIZE - 1)))  # four were empty
    assert kv.indexed_blocks == 3
    assert admitted(kv, sequence(4, list(range(100, 100 + 2 * SIZE + 1)))).computed == SIZE


def test_using_a_prefix_keeps_it() -> None:
    kv = cache(blocks=8)
    first = computed(kv, sequence(1, list(range(100, 100 + 2 * SIZE))))
    second = computed(kv, sequence(2, list(range(200, 200 + 2 * SIZE))))
    kv.free(first)
    kv.free(second)
    again = admitted(kv, sequence(3, list(range(100, 100 + 2 * SIZE + 1))))
    kv.free(again)
    kv.free(admitted(kv, sequence(4, 6 * SIZE - 1)))
    assert admitted(kv, sequence(5, list(range(100, 100 + 2 * SIZE + 1)))).computed == 2 * SIZE
    assert admitted(kv, sequence(6, list(range(200, 200 + 2 * SIZE + 1)))).computed == 0


def test_a_prefix_that_is_idle_counts_as_room_only_once() -> None:
    kv = cache(blocks=4)
    kv.free(computed(kv, sequence(1, list(range(4 * SIZE - 1)))))  # three full blocks, one empty
    assert kv.indexed_blocks == 3
    assert not kv.admit(sequence(2, [*range(3 * SIZE), *range(50, 50 + SIZE)]))  # would need two more
    assert kv.indexed_blocks == 3
    assert admitted(kv, sequence(3, list(range(4 * SIZE - 1)))).computed == 3 * SIZE


def test_whoever_is_set_back_finds_what_is_left_of_its_work() -> None:
    kv = cache(blocks=10)
    one = admitted(kv, sequence(1, 2 * SIZE))
    one.output, one.computed = [1] * SIZE, 3 * SIZE - 1
    kv.free(one)
    one.set_back()
    assert admitted(kv, one).computed == 2 * SIZE
    assert one.prefill_end == one.length == 3 * SIZE


class Device:
    """Remembers which token's KV is at each place of each block, and gives every sequence its next token."""

    def __init__(self, blocks: int) -> None:
        self.tokens = np.full((blocks + 1, SIZE), -1)

    def truth(self, one: Sequence) -> list[int]:
        """All its tokens and the next one, that which nobody has read included: a function of those before."""
        known: list[int] = one.tokens(0, one.known).tolist()
        for _ in range(one.pending + 1):
            known.append(sum(known) % 3)
        return known

    def compute(self, kv: PagedKVCache, one: Sequence, stop: int) -> None:
        truth = self.truth(one)
        for place in range(one.computed, stop):
            self.tokens[kv.tables[one.row, place // SIZE], place % SIZE] = truth[place]
        one.computed = stop

    def check(self, kv: PagedKVCache, one: Sequence) -> None:
        places = range(one.computed)
        found = [int(self.tokens[kv.tables[one.row, place // SIZE], place % SIZE]) for place in places]
        assert found == self.truth(one)[: one.computed]


def check_pool(kv: PagedKVCache, running: list[Sequence]) -> None:
    owned = [blocks_of(kv, one) for one in running]
    uses = np.bincount([block for blocks in owned for block in blocks], minlength=kv.blocks + 1)
    assert kv._uses == uses.tolist()
    used = {block for blocks in owned for block in blocks}
    assert kv.used_blocks == len(used)
    groups = [used, set(kv._idle), set(kv._empty)]
    assert set.union(*groups) == set(range(1, kv.blocks + 1))
    assert sum(map(len, groups)) == kv.blocks == len(used) + len(kv._idle) + len(kv._empty)
    assert {digest: block for block, digest in kv._digests.items()} == kv._known
    assert set(kv._idle) <= set(kv._digests)
    assert all(len(blocks) >= -(-(one.computed) // SIZE) for one, blocks in zip(running, owned, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_everybody_reads_its_own_tokens(seed: int) -> None:
    random = np.random.default_rng(seed)
    blocks = int(random.integers(12, 40))
    kv, device = cache(blocks, slots=5, context_length=4 * blocks), Device(blocks)
    running: list[Sequence] = []
    waiting: list[Sequence] = []
    reused = set_back = 0
    for number in range(1200):
        action = random.random()
        if action < 0.2:
            prompt = [1, 1, 2, 0, 1, 2, 2, 1][: int(random.integers(1, 9))]
            waiting.append(sequence(number, prompt + random.integers(0, 2, int(random.integers(1, 12))).tolist()))
        elif action < 0.4 and waiting and not waiting[0].pending and kv.admit(waiting[0]):
            reused += waiting[0].reused
            running.append(waiting.pop(0))
        elif action < 0.85 and running:
            one = running[int(random.integers(len(running)))]
            step(kv, device, one, random)
        elif running:
            one = running.pop(int(random.integers(len(running))))
            kv.free(one)
            if random.random() < 0.5:
                set_back += 1
                one.set_back()
                settle(device, one)
                waiting.append(one)
        for one in running:
            device.check(kv, one)
        check_pool(kv, running)
    assert reused
    assert set_back


def step(kv: PagedKVCache, device: Device, one: Sequence, random: np.random.Generator) -> None:
    """A chunk of prefill, a decoded token, or a token that is read."""
    if one.is_prefilling:
        device.compute(kv, one, int(random.integers(one.computed + 1, one.prefill_end + 1)))
        if not one.is_prefilling:
            one.pending += 1
    elif one.pending == 2 or (one.pending and random.random() < 0.5):
        one.output.append(device.truth(one)[one.known])
        one.pending -= 1
        if len(one.output) == 1:
            kv.store(one)
    elif one.length < 4 * kv.blocks - 1 and kv.grow(one):
        device.compute(kv, one, one.computed + 1)
        one.pending += 1


def settle(device: Device, one: Sequence) -> None:
    while one.pending:
        one.output.append(device.truth(one)[one.known])
        one.pending -= 1
