"""A model's sessions on a CUDA device: weights uploaded, operators chosen, ranges and roundings measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from engine.catalog import find_checkpoint
from engine.checkpoints import Artifact
from engine.config import EngineConfig
from engine.graphs.cuda import CudaGraph, cuda_decoder
from engine.graphs.cuda.fused import Fusion
from engine.runners.calibration import calibration_tokens, kv_ranges
from engine.runners.float_inputs import float_inputs
from engine.runners.fusion import Parts, open_fusion, wanted_fusion
from engine.runners.tower_inputs import tower_float_inputs
from engine.runtime.cuda.cache_scales import scale_inputs
from engine.runtime.cuda.encoder import CudaEncoder, open_encoder
from engine.runtime.cuda.pieces import OUR_SIZES, SIZES
from engine.runtime.cuda.session import CudaSession
from engine.runtime.cuda.weights import DeviceWeights, torch_type
from engine.spec import FloatType


@dataclass(frozen=True, slots=True)
class Sessions:
    """`decoding` runs captured decode steps; `cache_scales` belong to int8 KV. `paged` as the graphs were made; the
    packed one is captured for prompts' pieces of the sizes `pieces`. `mutual` runs steps of images whose tokens see
    each other in both directions.
    """

    packed: CudaSession
    paged: bool
    pieces: tuple[int, ...]
    decoding: CudaSession | None
    mutual: CudaSession | None
    tower: CudaEncoder | None
    cache_scales: Mapping[str, torch.Tensor] | None
    fusion: Fusion
    weight_bytes: int


def open_sessions(
    name: str,
    artifact: Artifact,
    config: EngineConfig,
    activations: FloatType,
    device: torch.device,
    *,
    step_tokens: int,
    block_size: int,
    parts: Parts | None,
) -> Sessions:
    """For calls of up to `step_tokens` tokens. Raises torch.OutOfMemoryError."""
    spec, checkpoint = artifact.spec, find_checkpoint(name, config.storage)
    wanted = wanted_fusion(artifact, config, device, parts)
    rows = max(step_tokens, calibration_tokens(checkpoint, spec)) if wanted.linear else step_tokens
    fusion, register = open_fusion(wanted, artifact, config, torch_type(activations), device, rows, block_size, parts)
    weights = DeviceWeights(artifact, device)

    def open_session(graph: CudaGraph, **kind: bool) -> CudaSession:
        return CudaSession(graph, weights.upload(graph.weights), artifact.folder, device, register, **kind)

    measures = parts is None or parts.measured_inputs
    tower = None
    if spec.vision:
        choose = partial(tower_float_inputs, checkpoint, artifact, activations, device) if measures else None
        tower, fusion = open_encoder(artifact, activations, device, fusion, register, choose)
    measured = (checkpoint, artifact, activations, open_session, tower, device)
    if fusion.linear and measures:
        fusion = replace(fusion, float_inputs=fusion.float_inputs | float_inputs(*measured))
    int8_cache = config.kv_precision == "int8"
    scales = None
    if int8_cache:
        scales = scale_inputs(kv_ranges(*measured, fusion), spec.decoder.attention_layers, device)
    torch.cuda.empty_cache()  # what measuring took
    paged = activations != "float32"  # PagedAttention has no kernel for it
    # Rotary operators refuse a call of more tokens than their tables have.
    positions = max(spec.decoder.context_length, step_tokens)
    make_graph = partial(
        cuda_decoder,
        *(artifact, activations, positions),
        paged=paged,
        int8_cache=int8_cache,
        fusion=fusion,
    )
    pieces = _pieces(artifact, fusion) if paged else ()
    packed = open_session(make_graph(), captures=bool(pieces), waits=not paged)
    decoding = open_session(make_graph(decode=True), captures=True, few_shapes=True) if paged else None
    mutual = open_session(make_graph(mutual=True), waits=not paged) if spec.decoder.mutual_images else None
    weight_bytes = weights.nbytes + (tower.weight_bytes if tower is not None else 0)
    return Sessions(packed, paged, pieces, decoding, mutual, tower, scales, fusion, weight_bytes)


def _pieces(artifact: Artifact, fusion: Fusion) -> tuple[int, ...]:
    """Where the host was measured to take longer than the device: products in 16 bits, and our own of int8 weights, for
    which it takes 13 ms in a 2B model, whatever the number of tokens.
    """
    if fusion.linear:
        return OUR_SIZES
    return SIZES if artifact.precision != "int8" else ()
