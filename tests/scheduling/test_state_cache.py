"""Prefixes of models whose rows have a state: known only where somebody kept it."""

from __future__ import annotations

import random

import numpy as np

from engine.scheduling.kv_cache import BLOCK, KVCache
from engine.scheduling.scheduler import Scheduler, StepLimits
from engine.scheduling.sequence import Sequence
from tests.scheduling.fakes import FakeMemory, sequence

CHUNK = 8 * BLOCK
STATE = 5  # blocks


def scheduler(rows: int = 4, blocks: int = 1000) -> tuple[Scheduler, KVCache, FakeMemory]:
    memory = FakeMemory(rows)
    kv = KVCache(memory, blocks, state_blocks=STATE, chunk=CHUNK)
    return Scheduler(kv, StepLimits(CHUNK, 64, aligned_chunks=True)), kv, memory


def step(running: Scheduler, memory: FakeMemory) -> list[int]:
    """One step; the places where chunks ended. Every row must have seen the tokens that its KV is of."""
    plan = running.schedule()
    for chunk in plan.prefill:
        assert chunk.start == chunk.sequence.computed
        memory.compute(chunk.sequence, chunk.stop)
    for one in plan.decode:
        memory.compute(one, one.computed + 1)
    for one in plan.sequences:
        assert one.row is not None
        seen = one.tokens(0, one.computed)
        assert np.array_equal(memory.data[one.row, : one.computed], seen)
        assert memory.states[one.row, 0] == seen.sum() % 65536
    for one in (*plan.decode, *(chunk.sequence for chunk in plan.prefill if chunk.gives_token)):
        if one.computed == one.length:
            one.output.append(1000 + len(one.output))
            if len(one.output) == 1:
                running.kv.store(one)
    assert running.kv.used_blocks + running.kv.indexed_blocks <= running.kv.blocks
    return [chunk.stop for chunk in plan.prefill]


def prefilled(running: Scheduler, memory: FakeMemory, one: Sequence) -> list[int]:
    """Where the chunks of its prompt ended."""
    running.add(one)
    stops = []
    while not one.output:
        stops += step(running, memory)
    running.remove(one)
    return stops


def test_a_prompt_goes_on_from_the_last_whole_chunk_of_one_that_began_alike() -> None:
    running, _, memory = scheduler()
    shared = list(range(2 * CHUNK))
    assert prefilled(running, memory, sequence(1, [*shared, 7, 7])) == [CHUNK, 2 * CHUNK, 2 * CHUNK + 2]
    second = sequence(2, [*shared, 8, 8, 8])
    assert prefilled(running, memory, second) == [2 * CHUNK + 3]
    assert second.reused == 2 * CHUNK


def test_what_two_prompts_share_beyond_a_chunk_a_third_need_not_compute() -> None:
    running, _, memory = scheduler()
    shared = list(range(CHUNK + 6 * BLOCK + 3))
    prefilled(running, memory, sequence(1, [*shared, *[7] * 20]))
    second = sequence(2, [*shared, *[8] * 20])
    # From the first's chunk, to where the two part, to the end.
    assert prefilled(running, memory, second) == [CHUNK + 6 * BLOCK, CHUNK + 6 * BLOCK + 23]
    assert second.reused == CHUNK
    third = sequence(3, [*shared, *[9] * 20])
    assert prefilled(running, memory, third) == [CHUNK + 6 * BLOCK + 23]
    assert third.reused == CHUNK + 6 * BLOCK


def test_few_tokens_in_common_are_not_worth_a_state() -> None:
    running, kv, memory = scheduler()
    shared = list(range(3 * BLOCK))
    prefilled(running, memory, sequence(1, [*shared, *[7] * 40]))
    second = sequence(2, [*shared, *[8] * 40])
    assert prefilled(running, memory, second) == [3 * BLOCK + 40]
    assert second.reused == 0
    assert kv.indexed_blocks == 5 + 2, "blocks, no state"


def test_the_same_prompt_again_computes_its_end_only() -> None:
    running, _, memory = scheduler()
    tokens = list(range(3 * CHUNK + 5 * BLOCK))
    for reused in (0, 3 * CHUNK, 3 * CHUNK + 4 * BLOCK):
        one = sequence(1, tokens)
        prefilled(running, memory, one)
        assert one.reused == reused


def test_states_count_as_what_they_take_and_give_way() -> None:
    running, kv, memory = scheduler(blocks=CHUNK // BLOCK + 1 + 2 * STATE)
    one = sequence(1, list(range(CHUNK + 1)))
    assert kv.capacity == (CHUNK // BLOCK + 1 + STATE) * BLOCK
    running.add(one)
    step(running, memory)
    assert kv.used_blocks == CHUNK // BLOCK + 1 + STATE
    step(running, memory)
    # The row's blocks and state leave room for a state or for blocks, not both: the index kept what fitted.
    assert kv.used_blocks + kv.indexed_blocks <= kv.blocks
    running.remove(one)
    other = sequence(2, list(range(5000, 5000 + CHUNK)))
    assert kv.admit(other)
    assert kv.used_blocks == CHUNK // BLOCK + 1 + STATE


def test_a_row_and_its_state_fit_or_wait() -> None:
    kv = KVCache(FakeMemory(rows=2), blocks=STATE + 1, state_blocks=STATE)
    assert not kv.admit(sequence(1, BLOCK))
    assert kv.admit(sequence(2, BLOCK - 1))
    assert not kv.admit(sequence(3, 1))


def test_whatever_comes_every_row_holds_the_state_of_its_tokens() -> None:
    """Prompts that share prefixes, set-backs, and an index that is too small for them."""
    chance = random.Random(3)
    running, _, memory = scheduler(rows=3, blocks=60)
    roots = [[root * 10_000 + place for place in range(3 * CHUNK)] for root in range(2)]
    alive: list[Sequence] = []
    for number in range(120):
        tokens = chance.choice(roots)[: chance.randrange(1, 2 * CHUNK + 70)] + [number] * chance.randrange(1, 40)
        alive.append(sequence(number, tokens))
        running.add(alive[-1])
        for _ in range(chance.randrange(1, 5)):
            step(running, memory)
        for one in [one for one in alive if len(one.output) > 30 or chance.random() < 0.1]:
            running.remove(one)
            alive.remove(one)
    while alive:
        step(running, memory)
        for one in [one for one in alive if one.output]:
            running.remove(one)
            alive.remove(one)
