"""The physical limit of a piece of work: bytes over measured copy bandwidth, operations over measured matmul rate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoints import Artifact
from engine.spec import Precision, SiglipSpec

if TYPE_CHECKING:
    import torch

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_MATMUL_SIDE = {"cuda": 8192, "cpu": 1536}
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """What this device reaches on the simplest work there is. `matmul` is None where no rate is comparable."""

    copy: float  # bytes per second, read and written
    matmul: float | None  # operations per second
    matmul_dtype: str | None

    def limit_s(self, cost: Cost) -> float:
        """Seconds that nothing on this device can be faster than."""
        by_bytes = cost.bytes / self.copy
        return max(by_bytes, cost.operations / self.matmul) if self.matmul else by_bytes

    def card(self) -> dict[str, Any]:
        tera = None if self.matmul is None else round(self.matmul / 1e12, 3)
        return {"copy_gb_per_s": round(self.copy / 1e9, 1), "matmul_tflop_per_s": tera, "matmul": self.matmul_dtype}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a piece of work must read at least once, and compute."""

    bytes: int
    operations: int

    def against(self, rates: Rates, measured_s: float) -> dict[str, Any]:
        limit = rates.limit_s(self)
        return {**asdict(self), "limit_ms": round(1e3 * limit, 4), "share": round(limit / measured_s, 4)}


def decode_cost(artifact: Artifact, rows: int, context_tokens: int, kv_bytes_per_token: int) -> Cost:
    """One step of `rows` sequences that attend to `context_tokens` together; weights and KV are read once."""
    decoder = artifact.spec.decoder
    attention = 4 * decoder.layers * decoder.heads * decoder.head_dim * context_tokens
    layers, head = _weights(artifact, "layers."), _head(artifact)
    read = _bytes(artifact, "layers.", "norm.") + _head_bytes(artifact) + context_tokens * kv_bytes_per_token
    return Cost(read, 2 * (layers + head) * rows + attention)


def prefill_cost(artifact: Artifact, rows: int, tokens: int, kv_bytes_per_token: int) -> Cost:
    """`rows` prompts of `tokens` each, from nothing; logits of the last token only. Written KV counts as bytes."""
    decoder = artifact.spec.decoder
    attention = 4 * decoder.layers * decoder.heads * decoder.head_dim * rows * tokens * (tokens + 1) // 2
    products = 2 * (_weights(artifact, "layers.") * tokens + _head(artifact)) * rows
    read = _bytes(artifact, "layers.", "norm.") + _head_bytes(artifact) + rows * tokens * kv_bytes_per_token
    return Cost(read, products + attention)


def tower_cost(artifact: Artifact, images: int, patches: int) -> Cost:
    """`images` of `patches` each that attend to each other; tiles count as images."""
    vision = artifact.spec.vision
    assert vision is not None, "a text-only model has no tower"
    merged = patches // (vision.shuffle if isinstance(vision, SiglipSpec) else vision.merge) ** 2
    joined = _weights(artifact, "vision.merger.", "vision.projection.")
    each = _weights(artifact, "vision.") - joined
    attention = 4 * vision.layers * vision.hidden * patches * patches
    products = 2 * (each * patches + joined * merged)
    return Cost(_bytes(artifact, "vision."), images * (products + attention))


def _weights(artifact: Artifact, *prefixes: str) -> int:
    """Numbers in the matrices of the linear layers; learned positions are looked up, not multiplied."""
    found = (entry for name, entry in artifact.entries.items() if name.startswith(prefixes))
    return sum(int(np.prod(e.shape)) for e in found if len(e.shape) == 2 and ".position." not in e.name)


def _bytes(artifact: Artifact, *prefixes: str) -> int:
    return sum(entry.nbytes for name, entry in artifact.entries.items() if name.startswith(prefixes))


def _head(artifact: Artifact) -> int:
    return artifact.spec.decoder.vocab * artifact.spec.decoder.hidden


def _head_bytes(artifact: Artifact) -> int:
    """A tied head is the embedding; an embedding beside a head is read a row per token, which is nothing."""
    return _bytes(artifact, "embedding." if artifact.spec.decoder.tied_head else "head.")


def measure_rates(device: str, precision: Precision) -> Rates:
    """A second or less. On a CPU int8 products have no plain matmul to be compared with."""
    if device.startswith("cuda"):
        return _cuda_rates(device, precision)
    matmul = None if precision == "int8" else _numpy_matmul()
    return Rates(_numpy_copy(), matmul, None if matmul is None else "float32")


def _cuda_rates(device: str, precision: Precision) -> Rates:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}.get(precision, torch.float16)
    side, size = _MATMUL_SIDE["cuda"], _COPY_BYTES["cuda"]
    with torch.cuda.device(torch.device(device)):
        copy_s = _cuda_best(_cuda_copy(size))
        matmul_s = _cuda_best(_cuda_matmul(side, dtype))
        torch.cuda.empty_cache()
    return Rates(2 * size / copy_s, 2 * side**3 / matmul_s, str(dtype).removeprefix("torch."))


def _cuda_copy(size: int) -> Callable[[], object]:
    import torch

    source, target = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return lambda: target.copy_(source)


def _cuda_matmul(side: int, dtype: torch.dtype) -> Callable[[], object]:
    import torch

    if dtype == torch.int8:  # tensor cores take both operands along their depth
        rows, weight = (torch.randint(-127, 128, (side, side), dtype=dtype, device="cuda") for _ in range(2))
        sums = torch.empty(side, side, dtype=torch.int32, device="cuda")
        return lambda: torch._int_mm(rows, weight.T, out=sums)
    left, right, product = (torch.randn(side, side, dtype=dtype, device="cuda") for _ in range(3))
    return lambda: torch.mm(left, right, out=product)


def _cuda_best(work: Callable[[], object]) -> float:
    import torch

    times = []
    for _ in range(2 * _REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) / 1e3)  # from milliseconds
    return min(times)


def _numpy_copy() -> float:
    """All cores together, a part of the memory each."""
    cores = len(os.sched_getaffinity(0))
    size = _COPY_BYTES["cpu"] // cores
    pairs = [(np.ones(size, np.uint8), np.zeros(size, np.uint8)) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        best = _best(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs)))
    return 2 * size * cores / best


def _numpy_matmul() -> float:
    side = _MATMUL_SIDE["cpu"]
    left, right = (np.ones((side, side), np.float32) for _ in range(2))
    return 2 * side**3 / _best(lambda: left @ right)


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
