"""Prefixes on a device whose sequences have a state: known only where somebody kept it."""

from __future__ import annotations

import random

import numpy as np
import pytest

import engine.scheduling.paged
from engine.scheduling.paged import PagedKVCache
from engine.scheduling.scheduler import Scheduler, StepLimits
from engine.scheduling.sequence import Sequence
from tests.scheduling.fakes import sequence

BLOCK, CHUNK, SLOTS = 16, 64, 4


@pytest.fixture(autouse=True)
def _every_block_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.scheduling.paged, "_WORTH_A_STATE", BLOCK)


class FakeStates:
    """A state is the sum of the tokens that its slot has seen."""

    def __init__(self) -> None:
        self.sums: dict[int, int] = {}
        self.kept: dict[int, int] = {}

    def holds(self, slot: int) -> bool:
        return slot in self.sums

    def keep(self, slot: int, place: int) -> None:
        self.kept[place] = self.sums[slot]

    def restore(self, slot: int, place: int) -> None:
        self.sums[slot] = self.kept[place]

    def release(self, slot: int) -> None:
        self.sums.pop(slot, None)


class Host:
    """Runs steps and chooses tokens; whoever goes on must have seen what it is said to have seen."""

    def __init__(self, copies: int = 8, blocks: int = 200) -> None:
        self.states = FakeStates()
        self.kv = PagedKVCache(
            slots=SLOTS,
            blocks=blocks,
            block_size=BLOCK,
            context_length=1000,
            states=self.states,
            copies=copies,
            chunk=CHUNK,
        )
        self.scheduler = Scheduler(self.kv, StepLimits(CHUNK, 64, aligned_chunks=False))
        self.copies = copies

    def step(self) -> list[int]:
        """Where chunks ended."""
        plan = self.scheduler.schedule()
        sampled = plan.sampled
        stops = {chunk.sequence.number: chunk.stop for chunk in plan.prefill}
        for one in plan.sequences:
            assert one.row is not None
            seen = self.states.sums.get(one.row, 0) if one.computed else 0
            assert seen == one.tokens(0, one.computed).sum()
            stop = stops.get(one.number, one.computed + 1)
            self.states.sums[one.row] = seen + int(one.tokens(one.computed, stop).sum())
        plan.advance(sampled)
        for one in sampled:
            one.pending -= 1
            one.output.append(1000 + len(one.output))
            if len(one.output) == 1:
                self.kv.store(one)
        assert len(self.states.kept) <= self.copies
        return list(stops.values())

    def prefilled(self, one: Sequence) -> list[int]:
        """Where the chunks of its prompt ended."""
        self.scheduler.add(one)
        stops = []
        while not one.output:
            stops += self.step()
        self.scheduler.remove(one)
        return stops


def test_a_prompt_goes_on_from_the_last_whole_chunk_of_one_that_began_alike() -> None:
    host = Host()
    shared = list(range(2 * CHUNK))
    assert host.prefilled(sequence(1, [*shared, 7, 7])) == [CHUNK, 2 * CHUNK, 2 * CHUNK + 2]
    second = sequence(2, [*shared, 8, 8, 8])
    assert host.prefilled(second) == [2 * CHUNK + 3]
    assert second.reused == 2 * CHUNK


def test_what_two_prompts_share_is_the_thirds() -> None:
    host = Host()
    shared = list(range(3 * BLOCK))
    assert host.prefilled(sequence(1, [*shared, 7])) == [3 * BLOCK + 1]
    assert host.prefilled(sequence(2, [*shared, 8, 8])) == [3 * BLOCK, 3 * BLOCK + 2]
    third = sequence(3, [*shared, 9, 9, 9])
    assert host.prefilled(third) == [3 * BLOCK + 3]
    assert third.reused == 3 * BLOCK


def test_without_places_for_states_nothing_is_reused_and_no_prompt_is_cut() -> None:
    host = Host(copies=0)
    for number in range(3):
        one = sequence(number, list(range(3 * BLOCK + 1)))
        assert host.prefilled(one) == [3 * BLOCK + 1]
        assert one.reused == 0


def test_the_place_of_the_state_that_was_used_longest_ago_is_taken() -> None:
    host = Host(copies=2)
    prompts = [[first, *range(CHUNK), 5] for first in (1, 2, 3)]
    for number, prompt in enumerate(prompts):
        host.prefilled(sequence(number, prompt))
    reused = []
    for number, prompt in enumerate(prompts[::-1]):
        one = sequence(10 + number, prompt)
        host.prefilled(one)
        reused.append(one.reused)
    assert reused == [CHUNK, CHUNK, 0]


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_prompts_goes_on_with_the_state_of_its_own_tokens(seed: int) -> None:
    """Set back, relieved, cancelled and reused: `Host.step` looks at every state."""
    choose = random.Random(seed)
    host = Host(copies=3, blocks=40)
    stems = [list(range(100 * number, 100 * number + 70)) for number in range(3)]
    added: list[Sequence] = []
    for turn in range(1500):
        if len(added) < 60 and choose.random() < 0.1:
            stem = choose.choice(stems)[: choose.randint(1, 70)]
            one = sequence(turn, [*stem, *([7] * choose.randint(1, 50))])
            one.max_tokens = choose.randint(1, 60)
            added.append(one)
            host.scheduler.add(one)
        if choose.random() < 0.03:
            plan = host.scheduler.schedule()
            for one in plan.sequences:  # it fails, and the states were written
                assert one.row is not None
                host.states.sums[one.row] = host.states.sums.get(one.row, 0) + 12345
            if not host.scheduler.relieve(plan):
                for one in plan.sequences:
                    one.computed = 0
                    host.scheduler.remove(one)
            continue
        host.step()
        for one in added:
            if not one.ended and (len(one.output) >= one.max_tokens or choose.random() < 0.002):
                host.scheduler.remove(one)
    assert all(one.ended for one in added)
    assert any(one.reused for one in added) or seed
    assert not host.states.sums
    assert host.kv.used_blocks == 0
    assert len(set(host.kv._copies.values()) | set(host.kv._empty_places)) == 3
    assert np.all(host.kv.tables == 0)
