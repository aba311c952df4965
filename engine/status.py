"""What a loaded model is and does, in plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from engine.model import Model
from engine.replica import Replica


def model_status(model: Model) -> dict[str, Any]:
    return {
        "precision": model.artifact.precision,
        "weight_bytes": model.artifact.weight_bytes,
        "context_length": model.context_length,
        "replicas": [_replica_status(replica) for replica, _ in model.replicas],
    }


def _replica_status(replica: Replica) -> dict[str, Any]:
    scheduler = replica.scheduler
    return {
        "device": replica.device,
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "kv_blocks": scheduler.kv.blocks,
        "kv_blocks_used": scheduler.kv.used_blocks,
        "kv_blocks_indexed": scheduler.kv.indexed_blocks,
        "kv_tokens": scheduler.kv.capacity,
        "memory": asdict(replica.runner.memory()),
    }
