"""Replicas on a device that is not there: the CUDA runner, its graphs executed by `ReferenceSession` on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from engine.checkpoints import Artifact
from engine.config import EngineConfig
from engine.device import Devices, Gpu, resolve
from engine.engine import Engine
from engine.graphs.cuda import CudaGraph, cuda_decoder
from engine.graphs.cuda.fused import STOCK, Fusion
from engine.graphs.cuda.tower import cuda_tower
from engine.replica import Replica
from engine.runners.cuda import CudaRunner
from engine.runners.open_cuda import activation_type
from engine.runtime.cuda.decoder import PagedDecoder
from engine.runtime.cuda.encoder import CudaEncoder
from engine.runtime.cuda.weights import DeviceWeights, torch_type
from engine.sampling.device import DeviceSampler
from engine.scheduling.paged import PagedKVCache
from engine.scheduling.scheduler import Scheduler, StepLimits
from engine.stats import ModelMemory
from tests.cuda.reference import ReferenceSession
from tests.host.waiting import eventually

CPU = torch.device("cpu")


@dataclass
class FakeGpu:
    """What an engine finds instead of `open_cuda`; `sessions` are those of the decoders, in order of opening,
    and `decoding` those of their captured steps."""

    blocks: int = 64
    block_size: int = 16
    prefill_tokens: int = 64
    count: int = 1
    fusion: Fusion = STOCK
    copies: int = 4  # of states of linear attention
    paged: bool = True  # PagedAttention, which here takes fp32 as well
    in_parts: bool = False
    sessions: list[ReferenceSession] = field(default_factory=list)
    decoding: list[ReferenceSession] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)

    def devices(self, config: EngineConfig) -> Devices:
        """Instead of `resolve`."""
        if config.device == "cpu":
            return resolve(config)
        return Devices(tuple(Gpu(index, "fake", (9, 0), 1 << 34, 1 << 34) for index in range(self.count)))

    def open(self, name: str, artifact: Artifact, config: EngineConfig, index: int) -> Replica:
        spec, slots = artifact.spec, config.max_batch_size
        activations = activation_type(artifact.precision, spec.half)
        weights = DeviceWeights(artifact, CPU)
        context_length = min(spec.decoder.context_length, self.blocks * self.block_size)
        make_graph = partial(cuda_decoder, artifact, activations, context_length, paged=self.paged, fusion=self.fusion)
        session = _session(make_graph(), weights)
        decoding = _session(make_graph(decode=True), weights) if self.paged else None
        sampler = DeviceSampler(slots, spec.decoder.vocab, CPU, torch_type(activations))
        decoder = PagedDecoder(
            session,
            spec.decoder,
            sampler.slot_tokens,
            dtype=torch_type(activations),
            blocks=self.blocks + 1,
            block_size=self.block_size,
            slots=slots,
            context_length=context_length,
            step_tokens=self.prefill_tokens + slots,
            paged=self.paged,
            decoding=decoding,
            in_parts=self.in_parts,
            mutual=_session(make_graph(mutual=True), weights) if spec.decoder.mutual_images else None,
        )
        decoder.capture()
        if decoder.states is not None:
            decoder.states.make_places(self.copies)
        kv = PagedKVCache(
            slots=slots,
            blocks=self.blocks,
            block_size=self.block_size,
            context_length=context_length,
            states=decoder.states,
            copies=self.copies,
            chunk=self.prefill_tokens,
        )
        tower = _tower(artifact, self.fusion)
        runner = CudaRunner(spec, decoder, sampler, tower, kv, memory=ModelMemory(0, 0, 0, 0, 0))
        limits = StepLimits(self.prefill_tokens, 1024, aligned_chunks=False)
        replica = Replica(
            name,
            f"{artifact.digest} fake {activations}",
            f"cuda:{index}",
            runner,
            Scheduler(kv, limits),
            context_length,
        )
        self.sessions.append(session)
        self.decoding.append(decoding or session)
        self.replicas.append(replica)
        return replica


def _session(graph: CudaGraph, weights: DeviceWeights) -> ReferenceSession:
    return ReferenceSession(graph.model, weights.upload(graph.weights))


def _tower(artifact: Artifact, fusion: Fusion) -> CudaEncoder | None:
    if artifact.spec.vision is None:
        return None
    activations = activation_type(artifact.precision, artifact.spec.half)
    graph = cuda_tower(artifact, activations, fusion)
    return CudaEncoder(_session(graph, DeviceWeights(artifact, CPU)), artifact.spec, activations, CPU)


def decoder_of(replica: Replica) -> PagedDecoder:
    assert isinstance(replica.runner, CudaRunner)
    return replica.runner.decoder


def settle(engine: Engine, model: str) -> None:
    """Wait until nothing is under way; then no block may be in use, whatever happened."""

    def idle() -> bool:
        replicas = engine.status()["models"][model]["replicas"]
        return not any(one["running"] or one["waiting"] for one in replicas) and not engine.status()["open_requests"]

    eventually(idle, "sequences are left over")
    assert not any(one["kv_blocks_used"] for one in engine.status()["models"][model]["replicas"])
