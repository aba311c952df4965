"""How many KV blocks a device's memory has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.errors import DeviceOutOfMemory

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Of one KV block, all layers together."""

    tokens: int
    nbytes: int


class KVBudget(NamedTuple):
    """`blocks` for sequences, besides block 0; `context_length` is what one of them may have, in tokens."""

    blocks: int
    context_length: int


def kv_budget(what: str, *, budget: int, taken: int, block: BlockSize, slots: int, model_context: int) -> KVBudget:
    """Divide what `taken` leaves of `budget`, in bytes, into blocks: no more than `slots` sequences can use.

    Raises DeviceOutOfMemory, with the numbers, when not even one block is left. `what` names model and device.
    """
    blocks = (budget - taken) // block.nbytes - 1  # block 0 takes the place of one
    if blocks < 1:
        raise DeviceOutOfMemory(
            f"{what} takes {taken // _MIB} MiB before any context and needs {-(-2 * block.nbytes // _MIB)} MiB more for"
            f" the least one, and gpu_memory allows {budget // _MIB} MiB; raise gpu_memory, unload other models, or"
            " choose precision int8"
        )
    context_length = min(model_context, blocks * block.tokens)
    return KVBudget(min(blocks, slots * -(-context_length // block.tokens)), context_length)
