"""A replica on a CUDA device. Runs on the thread that the device belongs to."""

from __future__ import annotations

import threading
import traceback
from functools import partial

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
from engine.runners.sessions import open_sessions
from engine.runtime.cuda.capture import allow_beside_capture
from engine.runtime.cuda.decoder import PagedDecoder
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


def _open(
    name: str, artifact: Artifact, config: EngineConfig, device: torch.device, budget: int, parts: Parts | None
) -> Replica:
    spec, slots = artifact.spec, config.max_batch_size
    activations = activation_type(artifact.precision, spec.half)
    dtype = torch_type(activations)
    before = torch.cuda.mem_get_info(device)[0]
    int8_cache = config.kv_precision == "int8"
    prefill_tokens = max(config.prefill_chunk or _PREFILL_TOKENS, whole_image_tokens(spec))
    step_tokens = prefill_tokens + slots
    block_size = kv_block_size(spec.decoder.head_dim)
    sessions = open_sessions(
        *(name, artifact, config, activations, device), step_tokens=step_tokens, block_size=block_size, parts=parts
    )
    tower = sessions.tower
    sampling = TorchSampling() if parts is not None and parts.torch_sampling else None
    sampler = DeviceSampler(slots, spec.decoder.vocab, device, dtype, sampling=sampling)
    states = None
    if spec.decoder.delta_net is not None:
        states = DeltaNetStates(spec.decoder.delta_net, slots, dtype, device)
    open_decoder = partial(
        PagedDecoder,
        *(sessions.packed, spec.decoder, sampler.slot_tokens),
        dtype=dtype,
        slots=slots,
        step_tokens=step_tokens,
        paged=sessions.paged,
        pieces=sessions.pieces,
        cache_scales=sessions.cache_scales,
        decoding=sessions.decoding,
        mutual=sessions.mutual,
        states=states,
    )
    open_decoder(blocks=1, block_size=block_size, context_length=step_tokens).rehearse()
    if tower is not None:
        tower.rehearse(_IMAGE_TOKENS)
    torch.cuda.synchronize(device)
    taken = before - torch.cuda.mem_get_info(device)[0]
    token_bytes = spec.decoder.kv_values_per_token * (torch.int8 if int8_cache else dtype).itemsize
    copies = _state_copies(states, budget - taken)
    blocks, context_length = kv_budget(
        _what(name, device, states, slots),
        budget=budget,
        taken=taken + (copies * states.state_bytes if states else 0),
        block=BlockSize(block_size, block_size * token_bytes),
        slots=slots,
        model_context=spec.decoder.context_length,
    )
    decoder = open_decoder(blocks=blocks + 1, block_size=block_size, context_length=context_length)
    if states is not None:
        states.make_places(copies)
    decoder.capture()
    torch.cuda.synchronize(device)
    occupied = before - torch.cuda.mem_get_info(device)[0]
    kv = PagedKVCache(
        slots=slots,
        blocks=blocks,
        block_size=block_size,
        context_length=context_length,
        states=states,
        copies=copies,
        chunk=prefill_tokens,
    )
    kv_bytes = decoder.kv_bytes + (states.nbytes if states else 0)
    memory = ModelMemory(
        weights=sessions.weight_bytes,
        kv=kv_bytes,
        kv_per_token=token_bytes,
        workspace=max(0, occupied - sessions.weight_bytes - kv_bytes),
        host=resident_bytes(),
    )
    limits = StepLimits(prefill_tokens, _IMAGE_TOKENS, aligned_chunks=False)
    return Replica(
        name=name,
        numerics=_numerics(artifact, activations, sessions.fusion, int8_cache=int8_cache),
        device=str(device),
        runner=CudaRunner(spec, decoder, sampler, tower, kv, memory=memory),
        scheduler=Scheduler(kv, limits),
        context_length=context_length,
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
    ours = [name for name in ("linear", "attention") if getattr(fusion, name)]
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
