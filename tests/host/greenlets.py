"""The client under gevent, as the plugin's process has it: prints one JSON object of what happened."""
# ruff: noqa: E402 - everything else is imported after the patches, as in the plugin

from gevent import monkey  # type: ignore[import-untyped]

monkey.patch_all(sys=True)

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import gevent

from engine.client import EngineClient
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.request import Chunk, Image, Message, Request, SamplingParams, Text
from tests.host.fake_engine import COMMAND
from tests.host.waiting import eventually

BEAT_S = 0.02


class Heart:
    """Ticks on the hub and remembers the longest time between two ticks."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        gevent.spawn(self._beat)

    def _beat(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(BEAT_S)
            now = time.monotonic()
            self.longest_s, last = max(self.longest_s, now - last), now


def request(model: str, tokens: int, image: bytes = b"") -> Request:
    return Request(model, (Message("user", (Text("hi"), Image(image))),), SamplingParams(max_tokens=tokens))


def text(client: EngineClient, wanted: Request) -> str:
    return "".join(event.text for event in client.stream(wanted) if isinstance(event, Chunk))


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except EngineError as error:
        return f"{error.code}: {error}"
    return "none"


def together(works: list[Callable[[], Any]]) -> list[Any]:
    return [job.get(timeout=30) for job in [gevent.spawn(work) for work in works]]


def opened(client: EngineClient) -> int:
    return int((client.status() or {"open": -1})["open"])


def main() -> None:
    heart, client = Heart(), EngineClient(EngineConfig(storage=Path(tempfile.gettempdir())), command=COMMAND)
    seen: dict[str, Any] = {}
    expected = "".join(f"{index} " for index in range(2000))
    texts = together([lambda: text(client, request("words", 2000)) for _ in range(64)])
    seen["streams"] = sum(found == expected for found in texts)
    texts = together([lambda: text(client, request("words", 5, bytes(30 << 20))) for _ in range(3)])
    seen["large"] = texts == ["0 1 2 3 4 "] * 3
    counting = gevent.spawn(error_of, lambda: client.count_tokens("slow", request("m", 1).messages))
    together([lambda: list(islice(client.stream(request("endless", 1)), 2)) for _ in range(300)])
    eventually(lambda: opened(client) == 0, "cancelled requests are open")
    seen["cancelled"] = (client.status() or {})["cancelled"]
    killed = [gevent.spawn(error_of, lambda: list(client.stream(request("endless", 1)))) for _ in range(32)]
    eventually(lambda: opened(client) == 32, "not all are open")
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    seen["killed"] = sum("signal 9" in job.get(timeout=30) for job in [counting, *killed])
    seen["afterwards"] = text(client, request("words", 3))
    abandoned = gevent.spawn(error_of, lambda: list(client.stream(request("endless", 1))))
    eventually(lambda: opened(client) == 1, "not open")
    abandoned.kill()
    eventually(lambda: opened(client) == 0, "a killed greenlet's request is open")
    list(client.stream(request("noise", 1)))
    client.close()
    os.environ["FAKE_START"] = "exit"
    seen["start"] = error_of(lambda: list(client.stream(request("words", 1))))
    seen["longest_s"] = heart.longest_s
    seen["heavy"] = sorted({"numpy", "torch", "transformers", "onnxruntime"} & set(sys.modules))
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
