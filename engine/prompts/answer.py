"""What a caller sees of a model's output: reasoning between its tags, calls of tools as calls."""

from __future__ import annotations

import dataclasses

from engine.errors import EngineError
from engine.prompts.reasoning import OPENING
from engine.prompts.tool_calls import ToolCallReader
from engine.request import Chunk, Event, Finished


class AnswerReader:
    """One stream's events, read in order. `opens_thinking`: the prompt has the opening tag, so the answer lacks it."""

    def __init__(self, *, opens_thinking: bool, calls: ToolCallReader | None) -> None:
        self._prefix = f"{OPENING}\n" if opens_thinking else ""
        self._calls = calls

    def read(self, event: Event | EngineError) -> list[Event | EngineError]:
        """The events to send in this one's place."""
        if isinstance(event, Chunk):
            return [self._shown(event)]
        if isinstance(event, Finished) and (rest := self._rest()) is not None:
            return [rest, event]
        return [event]

    def _shown(self, chunk: Chunk) -> Chunk:
        text, calls = (chunk.text, ()) if self._calls is None else self._calls.push(chunk.text)
        prefix, self._prefix = self._prefix, ""
        return dataclasses.replace(chunk, text=prefix + text, tool_calls=calls)

    def _rest(self) -> Chunk | None:
        if self._calls is None:
            return None
        text, calls = self._calls.flush()
        return Chunk(text, 0, calls) if text or calls else None
