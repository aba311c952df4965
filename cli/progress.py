"""One line that says how far something is, on stderr."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Rewritten in place on a terminal; elsewhere, in a log say, a line every ten seconds."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._pause_s = 0.2 if self._is_terminal else 10.0
        self._shown_at = float("-inf")
        self._is_open = False

    def show(self, text: str) -> None:
        now = time.monotonic()
        if now - self._shown_at < self._pause_s:
            return
        self._shown_at = now
        print(f"\r\x1b[K{text}" if self._is_terminal else text, end="" if self._is_terminal else "\n", file=sys.stderr,
              flush=True)  # fmt: skip
        self._is_open = self._is_terminal

    def close(self) -> None:
        if self._is_open:
            print(file=sys.stderr)
            self._is_open = False
