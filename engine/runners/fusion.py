"""Operators of our own for a model on a CUDA device, where the settings want them and the machine can have them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from engine.checkpoints import Artifact
from engine.config import EngineConfig
from engine.errors import KernelsUnavailable
from engine.graphs.builder import TESSERA
from engine.graphs.cuda.fused import STOCK, Fusion, fusable
from engine.graphs.cuda.fused_tower import TowerLinear
from engine.graphs.cuda.tower import tower_linears
from engine.runtime.cuda.buckets import Buckets
from engine.runtime.cuda.capture import allow_beside_capture
from engine.spec import ModelSpec, SiglipSpec

logger = logging.getLogger(__name__)

Register = Callable[[Any], None]
"""Makes operators known to an onnxruntime.SessionOptions."""

_MEASURED = 9  # compute capability
FOLDER = "kernels"  # of the storage folder
_COMPILED = "compiled"  # of that


@dataclass(frozen=True, slots=True)
class Parts:
    """What of ours runs, for a bench that switches it part by part: unlike the setting it does not give way."""

    fusion: Fusion
    torch_sampling: bool = False
    measured_inputs: bool = False  # as without parts: the layers that read 16-bit rows, instead of `fusion`'s
    tuning: bool = True  # without, kernels take tiles that were measured before, or the default ones


def wanted_fusion(artifact: Artifact, config: EngineConfig, device: torch.device, parts: Parts | None = None) -> Fusion:
    """`auto` takes the operators where they were measured to be faster than ONNX Runtime's: on an H100, in decoders.

    `on` has a tower's linear layers ours as well if its images are many tiles, some 10,000 rows: half the bytes, in
    a fifth more time. Of the Qwen families' towers an image has a thousand or two, with which the host would be longer.
    """
    if parts is not None:
        return parts.fusion
    auto = config.kernel_fusion == "auto"
    if config.kernel_fusion == "off" or artifact.precision == "fp32":
        return STOCK
    if auto and not _is_measured(device):
        return STOCK
    if not fusable(artifact.spec.decoder):
        if auto:
            return STOCK
        logger.warning("kernel_fusion does not know the layers of %s; they run without", artifact.spec.family)
        return STOCK
    linear = artifact.precision == "int8"
    tower = linear and not auto and isinstance(artifact.spec.vision, SiglipSpec)
    return Fusion(linear=linear, attention=True, tower=tower)


def _is_measured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _MEASURED


def open_fusion(
    fusion: Fusion,
    artifact: Artifact,
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    step_tokens: int,
    block_size: int,
    parts: Parts | None = None,
) -> tuple[Fusion, Register | None]:
    """Which operators are ours, and how sessions come to know them; STOCK where they cannot be had, which is logged.

    Takes the memory that they work in, for steps of up to `step_tokens` tokens. With `parts` it raises
    KernelsUnavailable instead.
    """
    if fusion == STOCK:
        return STOCK, None
    try:
        tune = fusion.linear and (parts is None or parts.tuning)
        tower = tower_linears(artifact) if fusion.tower else ()
        return fusion, _operators(artifact.spec, tower, config, dtype, device, step_tokens, block_size, tune=tune)
    except KernelsUnavailable as error:
        if parts is not None:
            raise
        logger.warning("%s", error)
        return STOCK, None


def _operators(
    model: ModelSpec,
    tower: Sequence[TowerLinear],
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    step_tokens: int,
    block_size: int,
    *,
    tune: bool,
) -> Register:
    """Raises KernelsUnavailable where there is no C compiler, no Triton, an untested ONNX Runtime, or a GPU whose
    programs have too little memory of their own.
    """
    try:
        from engine.kernels import bridge, operators, tuning
        from engine.kernels.compiled import keep_compiled
        from engine.kernels.tiles import LEAST_SHARED_BYTES, Tiles
        from engine.kernels.workspace import Workspace
        from engine.runners.tower_parts import tower_parts
    except ImportError as error:
        raise KernelsUnavailable(f"the fused kernels cannot be imported: {error}") from error
    folder = config.storage / FOLDER
    if reason := bridge.unavailable(folder):
        raise KernelsUnavailable(reason)
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    if shared_bytes < LEAST_SHARED_BYTES:
        raise KernelsUnavailable(
            f"the fused kernels need {LEAST_SHARED_BYTES >> 10} KiB of shared memory a program, as A100 and H100 have; "
            f"{properties.name} has {shared_bytes >> 10}"
        )
    multiprocessors = properties.multi_processor_count
    keep_compiled(folder / _COMPILED)
    operators.try_out(operators.Device(dtype, Workspace(0, device), Tiles(), multiprocessors))
    spec, parts = model.decoder, tower_parts(tower, model.vision)
    decoding = [(bucket.batch, bucket.context) for bucket in Buckets(config.max_batch_size, spec.context_length)]
    tiles = tuning.tuned_tiles(
        spec,
        device=device,
        dtype=dtype,
        folder=folder,
        decode_rows={batch for batch, _ in decoding},
        step_tokens=step_tokens,
        tower=parts,
        budget=tuning.BUDGET_S if tune else 0.0,
        enter_thread=allow_beside_capture,
    )
    nbytes = operators.workspace_bytes(
        *(spec, tiles, multiprocessors),
        rows=step_tokens,
        decoding=decoding,
        block_size=block_size,
        tower=[part.layer for part in parts],
    )
    shared = operators.Device(dtype, Workspace(nbytes, device), tiles, multiprocessors)
    return partial(
        bridge.register,
        domain=TESSERA,
        operators=operators.decoder_operators(shared),
        provider="CUDAExecutionProvider",
        folder=folder,
    )
