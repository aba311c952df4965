"""What runs in a step, against a decoder that only remembers token ids."""

from __future__ import annotations

import numpy as np

from engine.scheduling.kv_cache import BLOCK, KVCache
from engine.scheduling.scheduler import Scheduler, StepLimits, StepPlan
from engine.scheduling.sequence import Sequence
from tests.scheduling.fakes import FakeMemory, image, sequence

CHUNK = 32
IMAGE_TOKENS = 64


def scheduler(rows: int = 4, blocks: int = 1000) -> tuple[Scheduler, FakeMemory]:
    memory = FakeMemory(rows)
    return Scheduler(KVCache(memory, blocks), StepLimits(CHUNK, IMAGE_TOKENS, aligned_chunks=True)), memory


def run(memory: FakeMemory, plan: StepPlan) -> list[Sequence]:
    """Compute the plan; every sequence that gets a token gets its own length as the token."""
    sampled = plan.sampled
    for chunk in plan.prefill:
        memory.compute(chunk.sequence, chunk.stop)
    for one in plan.decode:
        memory.compute(one, one.computed + 1)
    for one in sampled:
        one.output.append(one.length)
    return sampled


def test_a_prompt_is_computed_in_chunks_and_then_decodes() -> None:
    schedule, memory = scheduler()
    one = sequence(1, 2 * CHUNK + 5)
    schedule.add(one)
    stops = []
    for _ in range(3):
        plan = schedule.schedule()
        stops += [chunk.stop for chunk in plan.prefill]
        run(memory, plan)
    assert stops == [CHUNK, 2 * CHUNK, 2 * CHUNK + 5]
    assert schedule.schedule().decode == [one]


def test_a_long_prompt_does_not_stop_the_ones_that_decode() -> None:
    schedule, memory = scheduler()
    short, long = sequence(1, 4), sequence(2, 10 * CHUNK)
    schedule.add(short)
    run(memory, schedule.schedule())
    schedule.add(long)
    for step in range(10):
        plan = schedule.schedule()
        assert plan.decode == [short]
        assert [chunk.stop for chunk in plan.prefill] == [(step + 1) * CHUNK]
        run(memory, plan)


def test_short_prompts_share_a_steps_budget() -> None:
    schedule, _ = scheduler()
    for number in range(1, 5):
        schedule.add(sequence(number, CHUNK // 2 - 1))
    assert len(schedule.schedule().prefill) == 2


def test_chunks_end_at_the_same_places_whatever_runs_beside() -> None:
    schedule, memory = scheduler()
    schedule.add(sequence(1, CHUNK - 1))
    one = sequence(2, 2 * CHUNK)
    schedule.add(one)
    stops = []
    while not one.output:
        plan = schedule.schedule()
        stops += [chunk.stop for chunk in plan.prefill if chunk.sequence is one]
        run(memory, plan)
    assert stops == [CHUNK, 2 * CHUNK]


def test_a_sequence_waits_for_its_images_and_then_for_nothing() -> None:
    schedule, _ = scheduler()
    one = sequence(1, 20, [(2, image(b"a", 4)), (8, image(b"b", 4))])
    schedule.add(one)
    plan = schedule.schedule()
    assert [picture.key for picture in plan.images] == [b"a", b"b"]
    assert not plan.prefill
    assert not schedule.schedule().images  # they are with the encoder
    schedule.deliver({key: np.zeros((4, 8), np.float32) for key in (b"a", b"b")})
    assert [chunk.sequence for chunk in schedule.schedule().prefill] == [one]


def test_an_image_of_several_requests_is_encoded_once() -> None:
    schedule, _ = scheduler()
    for number in (1, 2):
        schedule.add(sequence(number, 20, [(2, image(b"a", 4))]))
    assert len(schedule.schedule().images) == 1
    schedule.deliver({b"a": np.zeros((4, 8), np.float32)})
    assert len(schedule.schedule().prefill) == 1  # the second one exceeds the step's budget
    assert not schedule.schedule().images


def test_an_encoder_batch_has_a_budget_and_takes_at_least_one_image() -> None:
    schedule, _ = scheduler()
    schedule.add(sequence(1, 2 * IMAGE_TOKENS, [(0, image(b"big", 2 * IMAGE_TOKENS - 1))]))
    schedule.add(sequence(2, 20, [(2, image(b"small", 4))]))
    assert [picture.key for picture in schedule.schedule().images] == [b"big"]


def test_the_sequences_of_a_failed_encoder_call_are_named() -> None:
    schedule, _ = scheduler()
    broken, fine = sequence(1, 20, [(2, image(b"a", 4))]), sequence(2, 20)
    schedule.add(broken)
    schedule.add(fine)
    schedule.schedule()
    assert schedule.give_up_images([b"a"]) == [broken]
    schedule.remove(broken)
    assert [chunk.sequence for chunk in schedule.schedule().prefill] == [fine]


def test_when_blocks_run_out_the_youngest_is_set_back_and_loses_nothing() -> None:
    schedule, memory = scheduler(blocks=6)
    old, young = sequence(1, BLOCK), sequence(2, BLOCK)
    schedule.add(old)
    schedule.add(young)
    outputs: dict[int, list[int]] = {1: [], 2: []}
    set_back = False
    for _ in range(200):
        plan = schedule.schedule()
        set_back |= young.row is None
        for one in run(memory, plan):
            assert one.row is not None
            assert np.array_equal(memory.data[one.row, : one.computed], one.tokens(0, one.computed))
            outputs[one.number].append(one.output[-1])
            if len(one.output) == 3 * BLOCK:
                schedule.remove(one)
    assert set_back
    assert outputs[1] == outputs[2] == list(range(BLOCK, 4 * BLOCK))


def test_a_removed_sequence_costs_nothing_any_more() -> None:
    schedule, memory = scheduler()
    running, waiting = sequence(1, 4), sequence(2, 4)
    schedule.add(running)
    run(memory, schedule.schedule())
    schedule.add(waiting)
    schedule.remove(running)
    schedule.remove(waiting)
    assert not schedule.schedule().sequences
    assert schedule.kv.used_blocks == 0
