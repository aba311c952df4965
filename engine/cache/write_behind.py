"""One thread that does slow things later, so that the step loop never waits for a disk."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

MAX_JOBS = 1024
MAX_BYTES = 64 << 20

logger = logging.getLogger("engine.cache")


class WriteBehind:
    """Runs jobs in order on a thread of its own. What a job raises is logged.

    The queue is bounded in jobs and in the bytes that they hold on to; what does not fit is dropped.
    """

    def __init__(self, name: str, *, max_jobs: int = MAX_JOBS, max_bytes: int = MAX_BYTES) -> None:
        self._max_jobs, self._max_bytes = max_jobs, max_bytes
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._bytes = 0
        self._unfinished = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None], nbytes: int = 0) -> bool:
        """Queue a job that holds `nbytes`; False when it was dropped."""
        with self._changed:
            full = len(self._jobs) >= self._max_jobs or (self._jobs and self._bytes + nbytes > self._max_bytes)
            if self._closing or full:
                return False
            self._jobs.append((job, nbytes))
            self._bytes += nbytes
            self._unfinished += 1
            self._changed.notify_all()
            return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything submitted so far is done; False when that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unfinished, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Take no more jobs and finish those queued; False when some are left after the time limit."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return True
        with self._changed:
            self._unfinished -= len(self._jobs)
            self._jobs.clear()
            self._bytes = 0
        return False

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job, nbytes = self._jobs.popleft()
                self._bytes -= nbytes
            try:
                job()
            except Exception:
                logger.exception("a write to the cache failed")  # the thread must outlive it
            with self._changed:
                self._unfinished -= 1
                self._changed.notify_all()
