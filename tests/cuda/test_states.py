"""States of linear attention on a device: whose they are, and where."""

from __future__ import annotations

import random

import torch

from engine.runtime.cuda.states import DeltaNetStates
from engine.spec import DeltaNetSpec

SLOTS = 5
SPEC = DeltaNetSpec(layers=(0, 1, 3), key_heads=1, value_heads=2, key_dim=4, value_dim=3, kernel=4)
CPU = torch.device("cpu")


def states() -> DeltaNetStates:
    return DeltaNetStates(SPEC, SLOTS, torch.float16, CPU)


def mark(memory: DeltaNetStates, row: int, value: float) -> None:
    for rows in memory._rows:
        rows[:, row] = value


def marks(memory: DeltaNetStates, row: int) -> set[float]:
    """What a row holds: one value, if all its parts went the same way."""
    return {value for rows in memory._rows for value in rows[:, row].flatten().tolist()}


def test_what_is_bound_is_the_first_rows_and_is_written_in_place() -> None:
    memory = states()
    inputs, outputs = memory.bound(3)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items()}
    assert shapes["state.recurrent.1"] == ((3, 2, 3, 4), torch.float32)
    assert shapes["state.window.3"] == ((3, 14, 3), torch.float16)
    assert len(shapes) == 6
    for name, tensor in inputs.items():
        assert outputs[name.replace("state", "state_out")].data_ptr() == tensor.data_ptr()
        assert tensor.is_contiguous()
    memory.clear([0])
    mark(memory, 1, 7.0)
    assert float(inputs["state.recurrent.3"][1].min()) == 7.0


def test_rows_follow_their_slots_through_any_steps() -> None:
    """Each step, some slots; each slot's state is the number of steps that it was in since it began."""
    choose = random.Random(0)
    memory, seen = states(), dict.fromkeys(range(SLOTS), 0)
    for _ in range(500):
        slots = choose.sample(range(SLOTS), choose.randint(1, SLOTS))
        cut = choose.randint(0, len(slots))
        groups = memory.arrange(slots[:cut], slots[cut:])
        assert [sorted(group) for group in groups] == [sorted(slots[:cut]), sorted(slots[cut:])]
        for row, slot in enumerate([*groups[0], *groups[1]]):
            if not seen[slot]:
                memory.clear([row])
            assert marks(memory, row) == {float(seen[slot])}
            seen[slot] += 1
            mark(memory, row, seen[slot])
        for slot in slots:
            if choose.random() < 0.2:
                memory.release(slot)
                seen[slot] = 0
        free = [row for row in range(SLOTS) if memory.free_from(row, row + 1)]
        for row in free:
            mark(memory, row, -1.0)  # as a captured step's padding does
        assert len(free) == sum(not count for count in seen.values())


def test_nothing_moves_while_the_same_sequences_go_on() -> None:
    memory = states()
    memory.arrange([3, 1, 4], [])
    moved: list[int] = []
    memory._copy = lambda source, target: moved.append(source)  # type: ignore[method-assign]
    assert memory.arrange([1, 4, 3], []) == [[3, 1, 4], []]
    memory.release(3)
    assert memory.arrange([1, 4], []) == [[4, 1], []]
    assert moved == [2], "one row closes the gap"


def test_a_copy_is_put_back_where_the_slot_is() -> None:
    memory = states()
    memory.make_places(2)
    memory.arrange([0, 1], [])
    mark(memory, 1, 5.0)
    memory.keep(1, 1)
    mark(memory, 1, 6.0)
    memory.release(1)
    memory.restore(2, 1)
    assert memory.arrange([0, 2], []) == [[0, 2], []]
    assert marks(memory, 1) == {5.0}
    assert not memory.holds(1)
    assert memory.nbytes == (SLOTS + 1 + 2) * memory.state_bytes
