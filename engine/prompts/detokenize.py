"""Output tokens to text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.prompts.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 8  # tokens; no character has more than 4 bytes, so more pending tokens are not a character


class Detokenizer:
    """One sequence's output. Special tokens have no text; bytes that are no UTF-8 become U+FFFD, as in `decode`.

    Linear in the output: a byte-level vocabulary goes token by token through a UTF-8 decoder; any other is decoded in
    windows of the newest tokens, because its tokens' text depends on their neighbours (the scheme of Hugging Face's
    text-generation-inference).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._window: list[int] = []
        self._known = 0  # tokens of the window whose text is out

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is complete now: a character spread over several tokens comes with the last of them."""
        if self._utf8 is not None:
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, token_ids)))
        return "".join(map(self._push_window, token_ids))

    def flush(self) -> str:
        """What is incomplete, at the end of the output."""
        if self._utf8 is not None:
            return self._utf8.decode(b"", final=True)
        return self._new_text()

    def _push_window(self, token: int) -> str:
        if self._tokenizer.is_special(token):  # as a window's only context it would hide a leading space
            return ""
        self._window.append(token)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._window) - self._known <= _MAX_PENDING:
            return ""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return text

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._window[: self._known])
        return self._tokenizer.decode(self._window)[len(known) :]
