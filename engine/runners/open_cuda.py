"""A replica on a CUDA device. Runs on the thread that the device belongs to."""

from __future__ import annotations

import threading
import traceback
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import xxhash

from engine.checkpoints import Artifact
from engine.config import EngineConfig
from engine.device import memory_budget
from engine.errors import DeviceOutOfMemory, InvalidConfig
from engine.graphs.cuda.fused import Fusion
from engine.replica import Replica
from engine.runners.cuda import CudaRunner
from engine.runners.fusion import Parts
from engine.runners.kv_budget import BlockSize, kv_budget
from engine.runners.sessions import Sessions, open_sessions
from engine.runtime.cuda.capture import allow_beside_capture
from engine.runtime.cuda.decoder import PagedDecoder
from engine.runtime.cuda.encoder import CudaEncoder
from engine.runtime.cuda.failures import DeviceFailures
from engine.runtime.cuda.states import DeltaNetStates
from engine.runtime.cuda.weights import torch_type
from engine.sampling.device import DeviceSampler
from engine.sampling.device_torch import TorchSampling
from engine.scheduling.paged import PagedKVCache
from engine.scheduling.scheduler import Scheduler, StepLimits
from engine.spec import FloatType, ModelSpec, Precision, SiglipSpec
from engine.stats import ModelMemory, resident_bytes

_PREFILL_TOKENS = 1024
_IMAGE_TOKENS = 1024  # of one encoder batch: a few large images; more would hold up decoding for too long
_MOST_COPIES, _COPIES_SHARE = 64, 8  # of linear attention's states: so many, and that part of what KV could have
_MIB = 2**20
_own = threading.local()


def open_cuda(name: str, artifact: Artifact, config: EngineConfig, index: int, parts: Parts | None = None) -> Replica:
    """Upload, reserve KV blocks from what the budget leaves, capture the decode steps. `parts`: instead of the setting
    `kernel_fusion`.

    Raises DeviceOutOfMemory when the budget does not hold the weights and some context, and InvalidConfig for an int8
    KV cache beside fp32.
    """
    if artifact.precision == "fp32" and config.kv_precision == "int8":
        raise InvalidConfig("kv_precision int8 needs a model in 16 bits; choose precision auto, or kv_precision auto")
    device = torch.device("cuda", index)
    _take_over(device)
    torch.cuda.empty_cache()  # of models that were unloaded
    free = torch.cuda.mem_get_info(device)[0]
    try:
        with DeviceFailures(device):
            return _open(name, artifact, config, device, memory_budget(config, free), parts)
    except DeviceOutOfMemory as error:
        problem = str(error)
        traceback.clear_frames(error.__traceback__)  # they hold what was uploaded
        if error.__cause__ is not None:
            traceback.clear_frames(error.__cause__.__traceback__)
            problem = (
                f"{name} does not fit {device}, which has {free // _MIB} MiB free; unload other models, choose"
                " precision int8, or a smaller model"
            )
    torch.cuda.empty_cache()
    raise DeviceOutOfMemory(problem)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What is known before anything is opened. A step has `prefill_tokens` and one for each of `slots`; `token_bytes`
    are those of a token's keys and values in all layers."""

    activations: FloatType
    dtype: torch.dtype
    slots: int
    prefill_tokens: int
    block_size: int
    token_bytes: int

    @property
    def step_tokens(self) -> int:
        return self.prefill_tokens + self.slots

    @property
    def block(self) -> BlockSize:
        return BlockSize(self.block_size, self.block_size * self.token_bytes)


@dataclass(frozen=True, slots=True)
class _Room:
    """What the budget leaves, in blocks of KV, tokens of one sequence, and copies of linear attention's states."""

    blocks: int
    context_length: int
    copies: int


class _OpenDecoder(Protocol):
    def __call__(self, *, blocks: int, context_length: int) -> PagedDecoder: ...


def _open(
    name: str, artifact: Artifact, config: EngineConfig, device: torch.device, budget: int, parts: Parts | None
) -> Replica:
    spec, sizes = artifact.spec, _sizes(artifact, config)
    before = torch.cuda.mem_get_info(device)[0]
    sessions = open_sessions(
        *(name, artifact, config, sizes.activations, device),
        step_tokens=sizes.step_tokens,
        block_size=sizes.block_size,
        parts=parts,
    )
    sampler = _sampler(spec, sizes, device, parts)
    states = _states(spec, sizes, device)
    open_decoder = _decoder_opener(spec, sizes, sessions, sampler, states)
    _rehearse(open_decoder, sessions.tower, sizes)
    room = _room(_what(name, device, states, sizes.slots), spec, sizes, states, budget, _taken(before, device))
    decoder = open_decoder(blocks=room.blocks + 1, context_length=room.context_length)
    if states is not None:
        states.make_places(room.copies)
    decoder.capture()
    kv = _kv_cache(sizes, states, room)
    kv_bytes = decoder.kv_bytes + (states.nbytes if states else 0)
    memory = _memory(sessions.weight_bytes, kv_bytes, sizes.token_bytes, _taken(before, device))
    return Replica(
        name=name,
        numerics=_numerics(artifact, sizes.activations, sessions.fusion, int8_cache=config.kv_precision == "int8"),
        device=str(device),
        runner=CudaRunner(spec, decoder, sampler, sessions.tower, kv, memory=memory),
        scheduler=Scheduler(kv, StepLimits(sizes.prefill_tokens, _IMAGE_TOKENS, aligned_chunks=False)),
        context_length=room.context_length,
    )


def _sizes(artifact: Artifact, config: EngineConfig) -> _Sizes:
    spec = artifact.spec
    activations = activation_type(artifact.precision, spec.half)
    dtype = torch_type(activations)
    cached = torch.int8 if config.kv_precision == "int8" else dtype
    return _Sizes(
        activations,
        dtype,
        slots=config.max_batch_size,
        prefill_tokens=max(config.prefill_chunk or _PREFILL_TOKENS, whole_image_tokens(spec)),
        block_size=kv_block_size(spec.decoder.head_dim),
        token_bytes=spec.decoder.kv_values_per_token * cached.itemsize,
    )


def _sampler(spec: ModelSpec, sizes: _Sizes, device: torch.device, parts: Parts | None) -> DeviceSampler:
    sampling = TorchSampling() if parts is not None and parts.torch_sampling else None
    return DeviceSampler(sizes.slots, spec.decoder.vocab, device, sizes.dtype, sampling=sampling)


def _states(spec: ModelSpec, sizes: _Sizes, device: torch.device) -> DeltaNetStates | None:
    """Those of linear attention, if the model has it."""
    if spec.decoder.delta_net is None:
        return None
    return DeltaNetStates(spec.decoder.delta_net, sizes.slots, sizes.dtype, device)


def _decoder_opener(
    spec: ModelSpec, sizes: _Sizes, sessions: Sessions, sampler: DeviceSampler, states: DeltaNetStates | None
) -> _OpenDecoder:
    """The decoder comes twice: as small as it may be to see what a step takes, and as large as what is left."""
    return partial(
        PagedDecoder,
        *(sessions.packed, spec.decoder, sampler.slot_tokens),
        dtype=sizes.dtype,
        block_size=sizes.block_size,
        slots=sizes.slots,
        step_tokens=sizes.step_tokens,
        paged=sessions.paged,
        pieces=sessions.pieces,
        in_parts=sessions.fusion.linear,  # whose steps take the host longer than the device
        cache_scales=sessions.cache_scales,
        decoding=sessions.decoding,
        mutual=sessions.mutual,
        states=states,
    )


def _rehearse(open_decoder: _OpenDecoder, tower: CudaEncoder | None, sizes: _Sizes) -> None:
    """Take the working memory of the largest step and the largest batch of images."""
    open_decoder(blocks=1, context_length=sizes.step_tokens).rehearse()
    if tower is not None:
        tower.rehearse(_IMAGE_TOKENS)


def _taken(before: int, device: torch.device) -> int:
    """Bytes of the device that are gone since `before` were free, once all work is done."""
    torch.cuda.synchronize(device)
    return before - torch.cuda.mem_get_info(device)[0]


def _room(what: str, spec: ModelSpec, sizes: _Sizes, states: DeltaNetStates | None, budget: int, taken: int) -> _Room:
    """Raises DeviceOutOfMemory, naming `what`."""
    copies = _state_copies(states, budget - taken)
    blocks, context_length = kv_budget(
        what,
        budget=budget,
        taken=taken + (copies * states.state_bytes if states else 0),
        block=sizes.block,
        slots=sizes.slots,
        model_context=spec.decoder.context_length,
    )
    return _Room(blocks, context_length, copies)


def _kv_cache(sizes: _Sizes, states: DeltaNetStates | None, room: _Room) -> PagedKVCache:
    return PagedKVCache(
        slots=sizes.slots,
        blocks=room.blocks,
        block_size=sizes.block_size,
        context_length=room.context_length,
        states=states,
        copies=room.copies,
        chunk=sizes.prefill_tokens,
    )


def _memory(weights: int, kv: int, kv_per_token: int, occupied: int) -> ModelMemory:
    """`occupied` is all that opening took of the device."""
    return ModelMemory(
        weights=weights,
        kv=kv,
        kv_per_token=kv_per_token,
        workspace=max(0, occupied - weights - kv),
        host=resident_bytes(),
    )


def _state_copies(states: DeltaNetStates | None, left: int) -> int:
    """How many states the prefix index may keep of `left` bytes."""
    return min(_MOST_COPIES, max(0, left) // _COPIES_SHARE // states.state_bytes) if states is not None else 0


def _what(name: str, device: torch.device, states: DeltaNetStates | None, slots: int) -> str:
    """Model and device, and what of its memory the settings decide."""
    if states is None:
        return f"{name} on {device}"
    return f"{name} on {device}, with {states.nbytes // _MIB} MiB for states of {slots} sequences (max_batch_size),"


def _numerics(artifact: Artifact, activations: FloatType, fusion: Fusion, *, int8_cache: bool) -> str:
    """Weights, and all that another result can come from."""
    cache = " int8 kv" if int8_cache else ""
    ours = [name for name in ("linear", "attention", "tower") if getattr(fusion, name)]
    own = f" own {' '.join(ours)}" if ours else ""
    return f"{artifact.digest} cuda {activations}{cache}{own}{_digest(fusion.float_inputs)}"


def _digest(float_inputs: frozenset[str]) -> str:
    return f" wide {xxhash.xxh3_64_hexdigest(' '.join(sorted(float_inputs)).encode())}" if float_inputs else ""


def activation_type(precision: Precision, half: FloatType) -> FloatType:
    """int8 weights are multiplied with activations of the model's 16-bit type, `half`."""
    match precision:
        case "fp16":
            return "float16"
        case "bf16":
            return "bfloat16"
        case "fp32":
            return "float32"
        case "int8":
            return "bfloat16" if half == "bfloat16" else "float16"


def whole_image_tokens(spec: ModelSpec) -> int:
    """The tokens of an image that is one chunk whatever the budget; a step must hold them."""
    if not spec.decoder.mutual_images:
        return 0
    assert isinstance(spec.vision, SiglipSpec), "This is a bug: the size of an image's chunk is not known."
    return spec.vision.tokens_per_tile


def kv_block_size(head_dim: int) -> int:
    """Tokens per block. PagedAttention's kernels for large heads take fewer, and up to 128 are slower on less."""
    return 256 if head_dim <= 128 else 64


def _take_over(device: torch.device) -> None:
    """Give this thread a stream of its own on the device, once; all its sessions and torch's work go there."""
    if getattr(_own, "stream", None) is None:
        allow_beside_capture()
        torch.cuda.set_device(device)
        _own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(_own.stream)
