"""A process that uses the client and is killed: `python parent.py MODEL|start-HOW [gevent]`.

Prints the engine's process id when the request of that model is under way (or the start of that kind), then waits.
"""

from __future__ import annotations

import os
import sys

if "gevent" in sys.argv:
    from gevent import monkey  # type: ignore[import-untyped]

    monkey.patch_all(sys=True)

import tempfile
import threading
import time
from pathlib import Path

from engine.client import EngineClient
from engine.config import EngineConfig
from engine.request import Message, Request, Text
from tests.host.fake_engine import COMMAND
from tests.host.waiting import eventually


def main(model: str) -> None:
    is_start = model.startswith("start-")
    if is_start:
        os.environ["FAKE_START"] = model.removeprefix("start-")
    client = EngineClient(EngineConfig(storage=Path(tempfile.gettempdir())), command=COMMAND)
    stream = client.stream(Request(model, (Message("user", (Text("hi"),)),)))
    threading.Thread(target=next, args=(stream,), daemon=True).start()
    if is_start:
        eventually(lambda: client.pid is not None, "nothing was started")
    else:
        eventually(lambda: (client.status(timeout_s=30.0) or {}).get("submitted") == 1, "no request")
    if is_start or "gil" in model:
        time.sleep(0.5)  # nothing can be asked of a process in that state: let it get there
    sys.stdout.write(f"{client.pid}\n")
    sys.stdout.flush()
    time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1])
