"""Stands in for engine/client.py in a copy of the plugin: the last text of a request says what happens.

`say N WORD` streams N words, `fail CODE` and `break CODE` raise before and after a first word, `noise` prints from
Python and from C, `echo` answers with what the engine was asked, `forever` never ends.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import sys
import time
from collections.abc import Generator

from engine.config import EngineConfig
from engine.errors import error_from_code
from engine.request import (
    Chunk,
    Event,
    Finished,
    Image,
    ImageUrl,
    Message,
    Part,
    Request,
    Text,
    Timings,
    Tool,
    Usage,
    Video,
    VideoUrl,
)

closed: list[str] = []


class EngineClient:
    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    def stream(self, request: Request) -> Generator[Event, None, None]:
        command, *words = _last_text(request).split()
        try:
            for index, text in enumerate(self._answer(command, words, request)):
                yield Chunk(text, 1)
                if index % 8 == 7:
                    time.sleep(0)
        except GeneratorExit:
            closed.append(command)
            raise
        yield Finished("stop", Usage(7, index + 1, image_tokens=3), Timings(0.0, 0.0, 0.0), from_cache=command == "hit")

    def count_tokens(self, model: str, messages: tuple[Message, ...], tools: tuple[Tool, ...] = ()) -> int:
        return sum(len(part.text.split()) for message in messages for part in message.parts if isinstance(part, Text))

    def _answer(self, command: str, words: list[str], request: Request) -> Generator[str, None, None]:
        match command:
            case "say":
                yield from [words[1] + " "] * int(words[0])
            case "fail":
                raise error_from_code(words[0], "this is why")
            case "break":
                yield "so far "
                raise error_from_code(words[0], "this is why")
            case "noise":
                print("printed by Python")
                os.write(1, b"written to fd 1 without an end of line")
                ctypes.CDLL(None).printf(b"printed by C\n")
                ctypes.CDLL(None).fflush(None)
                yield "quiet"
            case "modules":
                yield json.dumps(sorted(sys.modules))
            case "closed":
                yield json.dumps(closed)
            case "forever":
                while True:
                    yield "on and on "
                    time.sleep(0.01)
            case _:
                yield json.dumps(_plain(request) | {"settings": self.config.to_mapping()})


def _plain(request: Request) -> dict[str, object]:
    parts = [(message.role, [_plain_part(part) for part in message.parts]) for message in request.messages]
    return {"model": request.model, "messages": parts, "sampling": dataclasses.asdict(request.sampling)}


def _plain_part(part: Part) -> str | int:
    match part:
        case Text(text):
            return text
        case Image(data) | Video(data):
            return len(data)
        case ImageUrl(url) | VideoUrl(url):
            return url


def _last_text(request: Request) -> str:
    return [part.text for message in request.messages for part in message.parts if isinstance(part, Text)][-1]


def shared_client(config: EngineConfig) -> EngineClient:
    return EngineClient(config)
