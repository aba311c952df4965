"""How a device's memory is divided, in plain numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.device import memory_budget
from engine.errors import DeviceOutOfMemory
from engine.runners.kv_budget import BlockSize, KVBudget, kv_budget

MIB = 2**20
BLOCK = BlockSize(tokens=256, nbytes=7 * MIB)


def divided(budget: int, taken: int = 0, slots: int = 32, model_context: int = 32768) -> KVBudget:
    return kv_budget("m on cuda:0", budget=budget, taken=taken, block=BLOCK, slots=slots, model_context=model_context)


def test_blocks_fill_what_is_left_and_block_0_takes_one_of_them() -> None:
    assert divided(1000 * MIB, 300 * MIB) == (99, 99 * 256)
    assert divided(1000 * MIB + 7 * MIB - 1, 300 * MIB).blocks == 99
    assert divided(1007 * MIB, 300 * MIB).blocks == 100


def test_a_context_is_no_longer_than_the_models() -> None:
    assert divided(10_000 * MIB) == (1427, 32768)
    assert divided(200 * MIB) == (27, 27 * 256)


def test_nobody_gets_blocks_that_no_sequence_could_use() -> None:
    assert divided(10_000 * MIB, slots=4, model_context=1000) == (4 * 4, 1000)
    assert divided(10_000 * MIB, slots=1, model_context=1) == (1, 1)


@pytest.mark.parametrize("left", [-500 * MIB, 0, 7 * MIB, 14 * MIB - 1])
def test_a_budget_without_room_for_a_block_is_refused_with_the_numbers(left: int) -> None:
    with pytest.raises(DeviceOutOfMemory, match=r"m on cuda:0 takes 900 MiB .* needs 14 MiB more .* allows \d+ MiB"):
        divided(900 * MIB + left, 900 * MIB)


def test_the_least_budget_is_one_block() -> None:
    assert divided(914 * MIB, 900 * MIB) == (1, 256)


def test_a_second_engine_divides_what_the_first_left(tmp_path: Path) -> None:
    """Shares are of what is free at the start; MiB are as they are written."""
    total, taken = 80_000 * MIB, 5000 * MIB
    share = EngineConfig(storage=tmp_path, gpu_memory=0.5)
    first = memory_budget(share, total)
    used = taken + (divided(first, taken, slots=1000).blocks + 1) * BLOCK.nbytes
    assert used <= first == 40_000 * MIB
    second = memory_budget(share, total - used)
    used += taken + (divided(second, taken, slots=1000).blocks + 1) * BLOCK.nbytes
    assert second <= 20_010 * MIB
    assert used <= total
    fixed = EngineConfig(storage=tmp_path, gpu_memory=20_000)
    assert memory_budget(fixed, total) == memory_budget(fixed, total - used) == 20_000 * MIB
