"""Stop words in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until a stop word is complete; what may become one is held back.

    The word that is complete first wins, of several the longest, so the result does not depend on how the text is cut
    into pieces. Knuth-Morris-Pratt: constant time per character and word.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._words = [_Word(word) for word in stop]
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may go out, whether a stop word ended it); after the end nothing goes out."""
        if self._stopped or not self._words:
            return ("" if self._stopped else text), self._stopped
        buffer = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            complete = [word.length for word in self._words if word.advance(character)]
            if complete:
                self._held, self._stopped = "", True
                return buffer[: end - max(complete)], True
        keep = len(buffer) - max(word.matched for word in self._words)
        self._held = buffer[keep:]
        return buffer[:keep], False

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held


class _Word:
    """How much of a word the text seen so far ends with."""

    def __init__(self, word: str) -> None:
        self._word = word
        self._borders = _borders(word)
        self.length = len(word)
        self.matched = 0

    def advance(self, character: str) -> bool:
        """Take in a character; True when the word is complete."""
        while self.matched and self._word[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        if self._word[self.matched] == character:
            self.matched += 1
        return self.matched == self.length


def _borders(word: str) -> list[int]:
    """For each prefix the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(word)
    length = 0
    for index in range(1, len(word)):
        while length and word[index] != word[length]:
            length = borders[length - 1]
        length += word[index] == word[length]
        borders[index] = length
    return borders
