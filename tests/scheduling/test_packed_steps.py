"""What runs in a step on a device: chunks that fill the budget, and tokens that are read a step later."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import pytest

from engine.scheduling.paged import PagedKVCache
from engine.scheduling.scheduler import Scheduler, StepLimits, StepPlan
from engine.scheduling.sequence import Sequence
from tests.scheduling.fakes import image, sequence

BLOCK, BUDGET = 8, 32


def scheduler(slots: int = 8, blocks: int = 200, context_length: int = 1600) -> Scheduler:
    kv = PagedKVCache(slots=slots, blocks=blocks, block_size=BLOCK, context_length=context_length)
    return Scheduler(kv, StepLimits(BUDGET, 64, aligned_chunks=False))


class LateHost:
    """Launches a step before it reads the one before; the token of a sequence is its length then."""

    def __init__(self, schedule: Scheduler) -> None:
        self.schedule = schedule
        self.under_way: deque[list[tuple[Sequence, int]]] = deque()

    def turn(self) -> StepPlan:
        plan = self.schedule.schedule()
        assert all(chunk.stop <= chunk.sequence.known for chunk in plan.prefill), "prefill of a token nobody knows"
        if plan.sequences:
            sampled = plan.sampled
            plan.advance(plan.sampled)
            self.under_way.append([(one, one.length - 1) for one in sampled])
        if len(self.under_way) > (1 if plan.sequences else 0):
            self.read()
        return plan

    def read(self) -> None:
        for one, token in self.under_way.popleft():
            if one.ended:
                continue
            one.pending -= 1
            one.output.append(token)
            if len(one.output) == 1:
                self.schedule.kv.store(one)
            if len(one.output) >= one.max_tokens:
                self.schedule.remove(one)


def chunks(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(chunk.sequence.number, chunk.start, chunk.stop, chunk.gives_token) for chunk in plan.prefill]


def test_prompts_fill_a_steps_budget_and_the_last_one_is_cut() -> None:
    schedule = scheduler()
    for number, tokens in ((1, 10), (2, 15), (3, 20), (4, 5)):
        schedule.add(sequence(number, tokens))
    host = LateHost(schedule)
    assert chunks(host.turn()) == [(1, 0, 10, True), (2, 0, 15, True), (3, 0, 7, False)]
    second = host.turn()
    assert chunks(second) == [(3, 7, 20, True), (4, 0, 5, True)]
    assert [one.number for one in second.decode] == [1, 2]


def test_decoding_does_not_count_against_the_budget() -> None:
    schedule = scheduler()
    host = LateHost(schedule)
    for number in range(1, 5):
        schedule.add(sequence(number, 3))
    host.turn()
    schedule.add(sequence(9, 3 * BUDGET + 1))
    for start in range(0, 3 * BUDGET, BUDGET):
        plan = host.turn()
        assert chunks(plan) == [(9, start, start + BUDGET, False)]
        assert len(plan.decode) == 4
    assert chunks(host.turn()) == [(9, 3 * BUDGET, 3 * BUDGET + 1, True)]


def test_who_waits_for_an_image_holds_nobody_up() -> None:
    schedule = scheduler()
    seeing = sequence(1, 20, [(2, image(b"a", 10))])
    schedule.add(seeing)
    schedule.add(sequence(2, 20))
    host = LateHost(schedule)
    first = host.turn()
    assert [picture.key for picture in first.images] == [b"a"]
    assert chunks(first) == [(2, 0, 20, True)]
    schedule.deliver({b"a": np.zeros((10, 4), np.float32)})
    assert chunks(host.turn()) == [(1, 0, 20, True)]


def test_a_chunk_names_the_images_and_rows_that_it_touches() -> None:
    schedule = scheduler()
    one = sequence(1, 70, [(4, image(b"a", 20)), (30, image(b"b", 10)), (45, image(b"c", 10))])
    schedule.add(one)
    host = LateHost(schedule)
    host.turn()
    schedule.deliver({key: np.zeros((size, 4), np.float32) for key, size in ((b"a", 20), (b"b", 10), (b"c", 10))})
    seen = [chunk for _ in range(3) for chunk in host.turn().prefill]
    assert [(chunk.start, chunk.stop, chunk.images) for chunk in seen] == [
        (0, 32, [0, 1]),
        (32, 64, [1, 2]),
        (64, 70, []),
    ]
    first, second, third = (chunk.feature_index(100) for chunk in seen)
    assert first.tolist() == [-1] * 4 + list(range(100, 120)) + [-1] * 6 + [120, 121]
    assert second.tolist() == list(range(102, 110)) + [-1] * 5 + list(range(110, 120)) + [-1] * 9
    assert third.tolist() == [-1] * 6


def test_a_token_that_nobody_has_read_yet_is_decoded_from() -> None:
    schedule = scheduler()
    one = sequence(1, 5)
    schedule.add(one)
    host = LateHost(schedule)
    host.turn()
    assert (one.computed, one.pending, one.output) == (5, 1, [])
    assert host.turn().decode == [one]
    assert (one.computed, one.pending, one.output) == (6, 1, [5])


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_no_step_computes_beyond_the_last_token(max_tokens: int) -> None:
    schedule = scheduler()
    one = sequence(1, 5)
    one.max_tokens = max_tokens
    schedule.add(one)
    host = LateHost(schedule)
    decoded = sum(len(host.turn().decode) for _ in range(12))
    assert one.ended
    assert decoded == max_tokens - 1
    assert one.output == list(range(5, 5 + max_tokens))
    assert schedule.kv.used_blocks == 0


def test_whoever_ends_early_leaves_a_step_under_way_that_changes_nothing() -> None:
    schedule = scheduler()
    one, other = sequence(1, 5), sequence(2, 6)
    for each in (one, other):
        schedule.add(each)
    host = LateHost(schedule)
    host.turn()
    host.turn()
    schedule.remove(one)  # with a token pending
    output = list(one.output)
    for _ in range(5):
        assert host.turn().decode == [other]
    assert one.output == output
    assert other.output == list(range(6, 12))


def test_who_is_set_back_waits_for_its_token_and_says_the_same() -> None:
    schedule = scheduler(slots=3, blocks=9, context_length=72)
    ones = [sequence(number, 6) for number in range(1, 4)]
    for one in ones:
        one.max_tokens = 40
        schedule.add(one)
    host, pending = LateHost(schedule), []
    set_back = schedule._set_back

    def noted(one: Sequence) -> None:
        pending.append((one.number, one.pending))
        set_back(one)

    schedule._set_back = noted  # type: ignore[method-assign, assignment]
    for _ in range(300):
        for one in host.turn().sequences:
            assert one.row is not None
    assert all(one.output == list(range(6, 46)) for one in ones)
    assert pending
    assert all(number != 1 for number, _ in pending), "the oldest is never set back"
    assert any(tokens for _, tokens in pending), "nobody was set back with a token under way"
    assert schedule.kv.used_blocks == 0


def test_nobody_is_admitted_whose_newest_token_is_not_known() -> None:
    schedule = scheduler()
    one = sequence(1, 6)
    schedule.add(one)
    one.pending = 1
    assert not schedule.schedule().sequences
    one.pending = 0
    assert schedule.schedule().sequences == [one]


def test_what_was_computed_before_a_set_back_is_prefilled_or_found() -> None:
    schedule = scheduler(blocks=100)
    one = sequence(1, 6)
    schedule.add(one)
    host = LateHost(schedule)
    for _ in range(12):
        host.turn()
    while host.under_way:
        host.read()
    schedule._set_back(one)
    plan = schedule.schedule()
    assert chunks(plan) == [(1, one.known // BLOCK * BLOCK, one.known, True)]
    assert not plan.decode


def test_a_step_that_does_not_fit_loses_its_younger_half_until_somebody_ends() -> None:
    schedule = scheduler()
    ones = [sequence(number, 3) for number in range(1, 6)]
    for one in ones:
        schedule.add(one)
    host = LateHost(schedule)
    host.turn()
    failed = schedule.schedule()
    assert schedule.relieve(failed)
    assert [one.number for one in schedule.running] == [1, 2, 3]
    assert [one.number for one in schedule.waiting] == [4, 5]
    for _ in range(3):
        assert [one.number for one in host.turn().sequences] == [1, 2, 3]
    schedule.remove(ones[1])
    assert {one.number for one in host.turn().sequences} == {1, 3, 4, 5}


def test_a_step_of_one_cannot_be_relieved() -> None:
    schedule = scheduler()
    schedule.add(sequence(1, 3))
    assert not schedule.relieve(schedule.schedule())


def test_nobody_waits_for_ever_after_a_relief() -> None:
    schedule = scheduler()
    ones = [sequence(number, 3) for number in (1, 2)]
    for one in ones:
        one.max_tokens = 5
        schedule.add(one)
    host = LateHost(schedule)
    assert schedule.relieve(schedule.schedule())
    assert schedule.relieve(schedule.schedule()) is False
    for _ in range(20):
        host.turn()
    assert all(one.output == [3, 4, 5, 6, 7] for one in ones)


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_ends_with_every_token_in_its_place(seed: int) -> None:
    random = np.random.default_rng(seed)
    schedule = scheduler(slots=5, blocks=24, context_length=150)
    host = LateHost(schedule)
    added: list[Sequence] = []
    for turn in range(3000):
        if len(added) < 40 and random.random() < 0.1:
            one = sequence(turn, [7] * int(random.integers(1, 90)) + [turn])
            one.max_tokens = int(random.integers(1, 50))
            added.append(one)
            schedule.add(one)
        plan = host.turn()
        assert sum(chunk.stop - chunk.start for chunk in plan.prefill) <= BUDGET
        assert len(plan.sequences) == len(set(map(id, plan.sequences))) <= 5
        if random.random() < 0.02 and not any(one.ended for one in plan.sequences):
            schedule.relieve(plan)
        if len(added) == 40 and all(one.ended for one in added):
            break
    for one in added:
        first = len(one.prompt.token_ids)
        assert one.output == list(range(first, first + one.max_tokens))
    assert schedule.kv.used_blocks == 0


def test_while_nobody_comes_or_goes_the_plan_is_the_last_one_again() -> None:
    """The object itself, until a block is needed or somebody has all its tokens."""
    schedule = scheduler()
    one, other = sequence(1, 5), sequence(2, 9)
    one.max_tokens, other.max_tokens = 40, 14
    host = LateHost(schedule)
    for added in (one, other):
        schedule.add(added)
    plans = [host.turn() for _ in range(10)]
    again = [plan is before for before, plan in itertools.pairwise(plans)]
    lengths = [(5 + step, 9 + step) for step in range(1, 10)]  # when the plan was made, the pending token included
    needs_block = [any((length + 1) % BLOCK == 1 for length in pair) for pair in lengths]
    assert again[0] is False, "prefill"
    assert [not repeated for repeated in again[2:]] == needs_block[2:]
    assert all(plan.decode == [one, other] for plan in plans[1:])


@pytest.mark.parametrize("event", ["comes", "goes", "is set back"])
def test_whoever_comes_or_goes_makes_a_new_plan(event: str) -> None:
    schedule = scheduler()
    host = LateHost(schedule)
    for number in (1, 2):
        schedule.add(sequence(number, BLOCK + number))
        schedule.waiting[-1].max_tokens = 100
    host.turn()
    before = host.turn()
    assert host.turn() is before
    match event:
        case "comes":
            schedule.add(sequence(3, 4))
        case "goes":
            schedule.remove(schedule.running[0])
        case _:
            schedule.relieve(before)
    plan = host.turn()
    assert plan is not before
    assert len(plan.sequences) == {"comes": 3, "goes": 1, "is set back": 1}[event]
