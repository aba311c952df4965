"""A replica on the CPU."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from engine.checkpoints import Artifact
from engine.config import EngineConfig
from engine.errors import InvalidConfig
from engine.replica import Replica
from engine.runners.cpu import CpuRunner
from engine.runtime import Decoder, Encoder
from engine.scheduling.kv_cache import BLOCK, KVCache
from engine.scheduling.scheduler import Scheduler, StepLimits

_SMALL_MODEL_BYTES = 64 * 2**20
_IMAGE_TOKENS = 64  # of one encoder batch: a larger one only keeps the first image waiting for the last
_PREFILL_TOKENS = 256
_HELPERS = 3  # beside the stepping thread: a step's budget of prompts feeds no more


def open_cpu(name: str, artifact: Artifact, config: EngineConfig) -> Replica:
    """Sessions, KV memory and scheduler. Raises InvalidConfig when the KV memory cannot be had."""
    spec = artifact.spec
    block_bytes = spec.decoder.kv_bytes_per_token * BLOCK
    blocks = config.kv_cache_mib * 2**20 // block_bytes
    state_bytes = spec.decoder.delta_net.state_bytes if spec.decoder.delta_net else 0
    state_blocks = -(-state_bytes // block_bytes)
    if state_blocks >= blocks > 0:
        raise InvalidConfig(
            f"kv_cache_mib is {config.kv_cache_mib}, but {name} keeps {state_bytes / 2**20:.0f} MiB of each sequence"
            " beside keys and values; raise it to some times that"
        )
    context_length = min(spec.decoder.context_length, (blocks - state_blocks) * BLOCK)
    threads = config.threads or _threads(artifact)
    idle = 0 if config.threads else _cores() - threads
    with ThreadPoolExecutor(1) as beside:  # a session packs its weights on one thread, for seconds
        opening = beside.submit(Encoder, artifact, threads=threads) if spec.vision else None
        decoder = Decoder(artifact, rows=config.max_batch_size, context_length=context_length, threads=threads)
        encoder = opening.result() if opening is not None else None
    limits = StepLimits(config.prefill_chunk or _PREFILL_TOKENS, _IMAGE_TOKENS, aligned_chunks=True)
    runner = CpuRunner(
        spec,
        decoder,
        encoder,
        helpers=min(_HELPERS, idle),
        weight_bytes=artifact.weight_bytes,
        kv_bytes=blocks * BLOCK * spec.decoder.kv_bytes_per_token,
    )
    kv = KVCache(runner.kv_memory, blocks, state_blocks=state_blocks, chunk=limits.prefill_tokens)
    return Replica(
        name=name,
        numerics=f"{artifact.digest} cpu",
        device="cpu",
        runner=runner,
        scheduler=Scheduler(kv, limits),
        context_length=context_length,
    )


def _threads(artifact: Artifact) -> int:
    """One core for a small model: its operators are over before a second thread has woken up to help."""
    return 1 if artifact.weight_bytes < _SMALL_MODEL_BYTES else _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
