"""Where a JSON text is inside a number, and when that number has digits enough.

JSON bounds no number's length, and a model that repeats itself writes digits for ever.
"""

from __future__ import annotations

MAX_DIGITS = 20  # in a row: a 64-bit integer has up to 20, a double's shortest form 17
MAX_EXPONENT_DIGITS = 2
_QUOTE, _BACKSLASH = b'"\\'
_DIGITS = frozenset(b"0123456789")
_EXPONENT = frozenset(b"eE")
_SIGNS = frozenset(b"+-")


class Numerals:
    """Follows a JSON text byte by byte."""

    def __init__(self) -> None:
        self._in_string = False
        self._escaped = False
        self._in_exponent = False
        self._run = 0

    def push(self, text: bytes) -> None:
        if self._in_string and not self._escaped and _QUOTE not in text and _BACKSLASH not in text:
            return  # most tokens
        for byte in text:
            if self._in_string:
                self._in_string = self._escaped or byte != _QUOTE
                self._escaped = byte == _BACKSLASH and not self._escaped
            elif byte in _DIGITS:
                self._run += 1
            else:
                self._run = 0
                self._in_string = byte == _QUOTE
                self._in_exponent = byte in _EXPONENT or (self._in_exponent and byte in _SIGNS)

    @property
    def room(self) -> int:
        """How many more digits may follow here; below 0 when there are more already."""
        return MAX_DIGITS if self._in_string else self._most - self._run

    @property
    def _most(self) -> int:
        return MAX_EXPONENT_DIGITS if self._in_exponent else MAX_DIGITS


def leading_digits(text: bytes) -> int:
    return len(text) - len(text.lstrip(b"0123456789"))
