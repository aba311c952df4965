"""What a loaded model occupies, by the engine's own account: the same words in every bench's card and in `doctor`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from engine.client import EngineClient
from engine.config import EngineConfig
from engine.errors import EngineStopped
from engine.request import Message, Text

Entry = dict[str, Any]
_MIB = 2**20


def replica_memory(status: Mapping[str, Any], model: str) -> list[Entry]:
    """One entry for each replica of a loaded model, of what `Engine.status` says.

    Keys: `model`, `device`, `precision`; bytes in `weights`, `kv`, `kv_per_token`, `workspace` and `host` (see
    engine.stats.ModelMemory); `kv_tokens` is how many tokens the reserved `kv` holds.
    """
    told = status["models"][model]
    return [
        {
            "model": model,
            "device": replica["device"],
            "precision": told["precision"],
            **replica["memory"],
            "kv_tokens": replica["kv_tokens"],
        }
        for replica in told["replicas"]
    ]


def client_memory(client: EngineClient, model: str) -> list[Entry]:
    """Load the model, unless it is loaded, and ask. Raises EngineError."""
    client.count_tokens(model, (Message("user", (Text("?"),)),))
    status = client.status()
    if status is None:
        raise EngineStopped("the engine's process ended while its memory was asked for; its log says why")
    return replica_memory(status, model)


def opened_memory(settings: Mapping[str, object], model: str) -> list[Entry]:
    """Of an engine that is opened for this alone, in a process of its own. Raises EngineError."""
    with contextlib.closing(EngineClient(EngineConfig.from_mapping(settings))) as client:
        return client_memory(client, model)


def memory_line(entry: Entry) -> str:
    """One entry in MiB; the host's is the whole process."""
    weights, kv, workspace, host = (f"{entry[name] / _MIB:,.0f} MiB" for name in ("weights", "kv", "workspace", "host"))
    where = f"{entry['model']} on {entry['device']}, {entry['precision']}"
    held = f"KV {kv} for {entry['kv_tokens']:,} tokens"
    return f"{where}: weights {weights}, {held}, workspace {workspace}, host {host}"
