"""What thinking models say before their answer, between <think> and </think>."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from engine.request import Message, Text

OPENING, CLOSING = "<think>", "</think>"
_BLOCK = re.compile(rf"\s*{OPENING}.*?{CLOSING}\s*", re.DOTALL)


def opens(prompt: str) -> bool:
    """The answer begins inside the reasoning, because the prompt has opened it."""
    return prompt.rstrip().endswith(OPENING)


def closed(prompt: str) -> str:
    """A prompt that opens the reasoning, with an empty one: the answer follows at once, as Qwen3's template does it."""
    return f"{prompt.rstrip()}\n\n{CLOSING}\n\n" if opens(prompt) else prompt


def without_earlier(messages: Sequence[Message], *, keep_current: bool) -> list[Message]:
    """Reasoning left out of the assistant's turns before the last question.

    What the assistant said since then, between calls of tools, is the template's to show or to leave out, if it knows
    of reasoning (`keep_current`).
    """
    questions = [place for place, message in enumerate(messages) if message.role == "user"]
    end = questions[-1] if keep_current and questions else len(messages)
    return [_without(message) if place < end else message for place, message in enumerate(messages)]


def _without(message: Message) -> Message:
    if message.role != "assistant" or not message.parts or not isinstance(message.parts[0], Text):
        return message
    text = message.parts[0].text
    found = _BLOCK.match(text)
    if found is None:
        return message
    return dataclasses.replace(message, parts=(Text(text[found.end() :]), *message.parts[1:]))
