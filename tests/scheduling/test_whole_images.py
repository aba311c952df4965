"""Images whose tokens see each other in both directions are computed in one piece, and nothing else with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engine.preprocess import ImageInput
from engine.scheduling.kv_cache import BLOCK, KVCache
from engine.scheduling.paged import PagedKVCache
from engine.scheduling.scheduler import Scheduler, StepLimits, StepPlan
from engine.scheduling.sequence import Sequence
from tests.scheduling.fakes import FakeMemory, image, sequence

CHUNK = 32
FEATURES = np.zeros((1, 1))


def whole(
    number: int, tokens: list[int] | int, *images: tuple[int, ImageInput], features: object = FEATURES
) -> Sequence:
    """As `sequence`, with the images' features there already."""
    one = sequence(number, tokens, list(images))
    one.prompt = replace(one.prompt, whole_images=True)
    one.features[:] = [features] * len(images)
    return one


def computed(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(number, start, stop) of the chunks, which are then computed."""
    chunks = [(chunk.sequence.number, chunk.start, chunk.stop) for chunk in plan.prefill]
    for chunk in plan.prefill:
        chunk.sequence.computed = chunk.stop
    return chunks


def test_chunks_end_where_an_image_begins_and_ends() -> None:
    schedule = Scheduler(KVCache(FakeMemory(2), 100), StepLimits(CHUNK, 64, aligned_chunks=True))
    long, short = image(b"a", CHUNK + 8), image(b"b", 5)
    schedule.add(whole(1, 120, (10, long), (52, short)))
    found = [computed(schedule.schedule()) for _ in range(7)]
    ends = [10, 10 + CHUNK + 8, 52, 57, 64, 96, 120]
    assert found == [[(1, start, stop)] for start, stop in zip([0, *ends], ends, strict=False)]


def test_an_image_at_the_very_beginning_and_at_the_very_end_is_whole() -> None:
    schedule = Scheduler(KVCache(FakeMemory(2), 100), StepLimits(CHUNK, 64, aligned_chunks=True))
    schedule.add(whole(1, 70, (0, image(b"a", 40)), (40, image(b"b", 30))))
    plans = [schedule.schedule()]
    assert computed(plans[0]) == [(1, 0, 40)]
    plans.append(schedule.schedule())
    assert computed(plans[1]) == [(1, 40, 70)]
    assert plans[1].prefill[0].gives_token
    assert all(chunk.is_whole_image for plan in plans for chunk in plan.prefill)


def test_a_step_that_is_one_call_has_either_images_or_text() -> None:
    kv = PagedKVCache(slots=4, blocks=100, block_size=16, context_length=200)
    schedule = Scheduler(kv, StepLimits(100, 64, aligned_chunks=False))
    for number, start in ((1, 8), (2, 0), (3, 30)):
        schedule.add(whole(number, 40, (start, image(bytes([number]), 10))))
    assert computed(schedule.schedule()) == [(1, 0, 8), (3, 0, 30)]
    plan = schedule.schedule()
    assert all(chunk.is_whole_image for chunk in plan.prefill)
    assert computed(plan) == [(1, 8, 18), (2, 0, 10), (3, 30, 40)]
    assert computed(schedule.schedule()) == [(1, 18, 40), (2, 10, 40)]


def test_an_image_waits_for_a_step_whose_budget_holds_it() -> None:
    kv = PagedKVCache(slots=4, blocks=100, block_size=16, context_length=200)
    schedule = Scheduler(kv, StepLimits(CHUNK, 64, aligned_chunks=False))
    schedule.add(whole(1, 40, (0, image(b"a", 20))))
    schedule.add(whole(2, 40, (0, image(b"b", 20))))
    assert computed(schedule.schedule()) == [(1, 0, 20)]
    # Text of the older one comes first; then there is room again.
    assert computed(schedule.schedule()) == [(1, 20, 40)]
    assert computed(schedule.schedule()) == [(2, 0, 20)]


def test_an_image_that_waits_for_its_features_does_not_hold_up_others() -> None:
    schedule = Scheduler(KVCache(FakeMemory(2), 100), StepLimits(CHUNK, 64, aligned_chunks=True))
    schedule.add(whole(1, 40, (4, image(b"a", 20)), features=None))
    schedule.add(whole(2, 20))
    assert computed(schedule.schedule()) == [(2, 0, 20)]


def test_a_prefix_is_reused_up_to_an_image_or_behind_it_and_never_inside() -> None:
    one_image = image(b"a", 40)
    tokens = list(range(100))
    for make in (
        lambda: KVCache(FakeMemory(2), 100),
        lambda: PagedKVCache(slots=2, blocks=100, block_size=BLOCK, context_length=200),
    ):
        for shared, reused in ((62, BLOCK), (64, 4 * BLOCK), (78, 4 * BLOCK)):
            kv = make()
            first = whole(1, tokens, (20, one_image))
            assert kv.admit(first)
            first.computed = 100
            kv.store(first)
            second = whole(2, [*tokens[:shared], *range(500, 520)], (20, one_image))
            assert kv.admit(second)
            assert second.reused == second.computed == reused, (type(kv), shared)
