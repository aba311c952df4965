"""A model on one device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from engine.runners.runner import Runner, StepResult
from engine.scheduling.scheduler import Scheduler, StepPlan


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A step that was launched and whose tokens are not read yet."""

    plan: StepPlan
    result: StepResult
    started_s: float


@dataclass(eq=False, slots=True)
class Replica:
    """`numerics` names weights and arithmetic: results of one name are the same.

    `load` counts the sequences that were handed to it and have not ended; the step loop keeps it.
    """

    name: str
    numerics: str
    device: str
    runner: Runner
    scheduler: Scheduler
    context_length: int
    load: int = 0
    under_way: deque[UnderWay] = field(default_factory=deque)
