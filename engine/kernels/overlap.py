"""Kernels that begin before the one before them has ended: programmatic dependent launch, from sm_90 on.

A decode step is a chain of 140 to 250 kernels of a few microseconds. Launched after one another each of them waits for
the last program of the one before, starts, and only then asks memory for its first weights: one to two microseconds in
which memory idles. Here a kernel says that the next may be launched (`let_next_begin`), which happens once all of its
programs have said so; the next one's programs take what room is left, ask for what no kernel of the chain writes
(weights, tables, tokens cached in earlier steps), and wait (`wait_for_last`) until all kernels before have ended and
what they wrote can be read.

When to say so was measured on an H100: as soon as a program has itself waited. Earlier, three kernels are on the device
at once, and the last one's programs are packed where the first two leave room instead of one to a multiprocessor: that
costs more than the start gains, as does a launch of many programs beside another (so from BESIDE rows on products do
not begin early), and as does asking L2 for all weights at once.

The rule that makes this right: a program reads nothing that a kernel of the chain writes, and writes nothing at all,
before it has waited. A program may end without waiting if others of its launch wait: a launch has ended when all of its
programs have, so whoever waits for it waits for the whole chain before it too.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, griddepcontrol and
cp.async.bulk.prefetch.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import cuda

BESIDE = 32  # rows: up to here a launch that prepares them is few programs, and products begin beside it
_CAPABILITY = (9, 0)


def early() -> bool:
    """Whether kernels on the current device are launched so."""
    if knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return _is_able(torch.cuda.current_device())


def launch_options(*, early: bool) -> dict[str, bool]:
    """What a launch of a kernel with this EARLY takes; Triton's interpreter knows no such option."""
    return {"launch_pdl": True} if early else {}


def copies_in_bulk(device: torch.device) -> bool:
    """Whether the device has a copy engine for tiles (cp.async.bulk.tensor)."""
    return _is_able(device.index)


@lru_cache
def _is_able(device: int | None) -> bool:
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


@triton.jit
def let_next_begin(EARLY: tl.constexpr) -> None:
    if EARLY:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(EARLY: tl.constexpr) -> None:
    if EARLY:
        cuda.gdc_wait()
