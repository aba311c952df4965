"""Wait for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], bool], otherwise: str, within_s: float = 10.0) -> None:
    """Fail with `otherwise` when the condition does not hold within a time that only a defect exceeds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)
