"""Sizes for which decode steps are captured."""

from __future__ import annotations

from itertools import pairwise

import pytest

from engine.runtime.cuda.buckets import Buckets


@pytest.mark.parametrize("max_batch", [1, 2, 3, 8, 9, 12, 13, 32, 100, 128, 1024])
@pytest.mark.parametrize("context", [1, 511, 512, 513, 1024, 5000, 32768])
def test_every_size_up_to_the_limits_has_a_bucket_that_holds_it(max_batch: int, context: int) -> None:
    buckets = Buckets(max_batch, context)
    known = set(buckets)
    assert len(known) == len(list(buckets)) == len(buckets)
    for batch in range(1, max_batch + 1, 1 if max_batch < 200 else 7):
        for longest in {1, 2, 511, 512, 513, 1000, 1025, context // 2, context - 1, context}:
            if 1 <= longest <= context:
                bucket = buckets.find(batch, longest)
                assert bucket in known
                assert batch <= bucket.batch <= max_batch
                assert bucket.shorter < longest <= bucket.context <= context


@pytest.mark.parametrize(("batch", "longest"), [(9, 100), (1, 1001), (9, 1001)])
def test_what_is_beyond_the_limits_is_refused(batch: int, longest: int) -> None:
    with pytest.raises(ValueError, match=f"{batch} sequences of up to {longest} tokens"):
        Buckets(8, 1000).find(batch, longest)


def test_padding_is_bounded() -> None:
    buckets = Buckets(256, 8192)
    for batch in range(1, 257):
        assert buckets.find(batch, 1).batch * 5 <= batch * 8
    for longest in range(512, 8193, 37):
        assert buckets.find(1, longest).context <= 2 * longest


def test_the_largest_comes_first_and_contexts_leave_no_gap() -> None:
    buckets = list(Buckets(32, 4096))
    assert (buckets[0].batch, buckets[0].context) == (32, 4096)
    spans = sorted({(bucket.shorter, bucket.context) for bucket in buckets})
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(spans))
