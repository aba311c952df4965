"""Tiles for a model on a device: measured when it first loads there, kept on disk, and read at every later start.

Two numbers, for qwen2-vl-2b. With up to 32 sequences there are 69 products, pairs of a weight's shape and a bucket of
rows (71 with 128), with 2,929 candidates (2,975). 15 of them are only compared; climbing tries at most 12 candidates of
each of the other 54 (56): 618 (642), less what is compiled for several buckets at once. At 8 a second from 8 cores on,
5 on 4, 1.5 on one (linear_bench.py), and 20 ms each to measure, that is more than 45 s hold, on 4 cores twice as much:
the budget ends it, the least important candidates last. Defaults come first, 76 kernels with those of 16-bit rows, 10 s
on 16 cores, which a start without tuning would compile as they are met. A start that finds everything on disk reads one
file. The tower's products are 34, searched from its usual rows on, with as many of 16-bit rows; their defaults are 34
kernels.

Measuring that ends for lack of time leaves defaults, and these are kept as well: a later start would take as long, and
the same request should get the same answer after it. What cannot be kept is not measured, for the same reason. A start
that is killed keeps nothing but what was compiled; after two of them nothing more is measured (tile_store.py).
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from engine.kernels.linear import LinearParameters
from engine.kernels.linear_bench import Layer, LinearBench, Setting
from engine.kernels.overlap import copies_in_bulk
from engine.kernels.search import GAIN, Bench, Choice, Task, search
from engine.kernels.tile_store import Chip, TileStore
from engine.kernels.tiles import GEMV_ROWS, MOST_ROWS, Kernel, Product, Tile, Tiles, candidates, rows_bucket
from engine.spec import DecoderSpec

BUDGET_S = 45.0
MOST_GEMV_ROWS = 8  # where a GEMV could still win; with more its registers do not suffice
FEWEST_ROWS = 16  # of a tile for tensor cores: with fewer rows the same tiles are as fast
PREFILL_ROWS = 256  # and more, of steps that read prompts; fewer are of short prompts or the ends of long ones
MOST_THREADS = 16
_PREFILL_WEIGHT = 1 / 8  # a step of prefill to one of decoding
_SELDOM_WEIGHT = 1 / 32
_COMPARED_WEIGHT = 1 / 4  # what is measured to be compared rather than to run
_CLIMBING = 0.9  # of the budget; the rest is for comparing
_BYTES_PER_S, _OPERATIONS_PER_S = 3e12, 1e15  # of an H100, for shares alone
_SOURCES = (
    "linear",
    "norm.py",
    "activation.py",
    "launcher.py",
    "overlap.py",
    "tiles.py",
    "tuning.py",
    "linear_bench.py",
    "search.py",
)
_log = logging.getLogger("engine.kernels")


@dataclass(frozen=True, slots=True)
class Part:
    """A linear layer of a decoder, `count` times in a step; the head has no rows but those that choose a token.

    Or one of a vision tower, which seldom sees fewer than `fewest` rows.
    """

    layer: Layer
    count: int
    head: bool = False
    fewest: int = 1

    def product(self, kernel: Kernel, rows: int) -> Product:
        return Product(kernel, rows, self.layer.n, self.layer.k, self.layer.parameters.gate)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured for a decoder. `decoding` are buckets of rows of decode steps."""

    parts: tuple[Part, ...]
    decoding: frozenset[int]
    settings: Mapping[Product, Setting]

    @property
    def compared(self) -> list[Product]:
        """Products of fewer rows than a tile has: they take that tile, and are timed to be compared with a GEMV."""
        return [product for product in self.settings if product.kernel == "int8" and product != self.like(product)]

    def like(self, product: Product) -> Product:
        """The one with more rows that fits the same tiles, if it has fewer than they."""
        rows = (known.rows for known in self.settings if replace(known, rows=product.rows) == product)
        return replace(product, rows=max(product.rows, min(FEWEST_ROWS, max(rows))))

    def share(self, product: Product) -> float:
        """Of the time that matters, by what an H100 would take."""
        shape = replace(product, kernel="int8", rows=0)
        calls = sum(part.count for part in self.parts if part.product("int8", 0) == shape)
        values = product.n * product.k
        seconds = max(values / _BYTES_PER_S, 2 * product.rows * values / _OPERATIONS_PER_S)
        return calls * seconds * self._weight(product)

    def _weight(self, product: Product) -> float:
        if product.kernel == "gemv" and product.rows > GEMV_ROWS:
            return _COMPARED_WEIGHT
        if product.kernel == "float":
            return _SELDOM_WEIGHT
        if product.rows in self.decoding:
            return 1.0
        return _PREFILL_WEIGHT if product.rows >= PREFILL_ROWS else _SELDOM_WEIGHT


def decoder_parts(spec: DecoderSpec) -> tuple[Part, ...]:
    attended = spec.heads * spec.head_dim
    normed, plain = LinearParameters(spec.norm_eps, "rms"), LinearParameters()
    gated = LinearParameters(spec.norm_eps, "rms", "silu_gate")
    qkv = Layer(attended + 2 * spec.kv_heads * spec.head_dim, spec.hidden, normed, spec.qkv_bias, residual=False)
    out = Layer(spec.hidden, attended, plain, spec.attention_out_bias, residual=True)
    gate_up = Layer(2 * spec.intermediate, spec.hidden, gated, spec.mlp_bias, residual=False)
    down = Layer(spec.hidden, spec.intermediate, plain, spec.mlp_bias, residual=True)
    head = Layer(spec.vocab, spec.hidden, normed, bias=False, residual=False)
    return (*(Part(layer, spec.layers) for layer in (qkv, out, gate_up, down)), Part(head, 1, head=True))


def plan_for(spec: DecoderSpec, decode_rows: Collection[int], step_tokens: int, tower: Sequence[Part] = ()) -> Plan:
    """For decode steps of these numbers of rows, prefill steps of up to `step_tokens`, and a tower of any number.

    Every bucket that a step can come to is in it, so that no request waits for a compiler. Of a tower those of smaller
    pictures are not.
    """
    parts, decoding = decoder_parts(spec), frozenset(map(rows_bucket, decode_rows))
    most = max(step_tokens, *decode_rows)
    settings: dict[Product, Setting] = {}
    for part in parts:
        for bucket in sorted(decoding) if part.head else _buckets(most):
            rows = min(bucket, max(decode_rows) if part.head else most)
            for kernel in _kernels(bucket):
                settings.setdefault(part.product(kernel, bucket), Setting(part.layer, rows))
    for part in tower:
        for bucket in _buckets(MOST_ROWS):
            for kernel in _kernels(bucket) if bucket >= part.fewest else ():
                if kernel != "gemv":  # which a tower takes only for rows that are not quantised, and so few
                    settings.setdefault(part.product(kernel, bucket), Setting(part.layer, bucket))
    return Plan((*parts, *tower), decoding, settings)


def _buckets(rows: int) -> list[int]:
    return [1 << bits for bits in range(rows_bucket(rows).bit_length())]


def _kernels(bucket: int) -> tuple[Kernel, ...]:
    """Layers that read 16-bit rows are few (engine/runners/float_inputs.py) and not known yet: all can be."""
    if bucket == 1:
        return ("gemv",)
    return ("gemv", "int8", "float") if bucket <= MOST_GEMV_ROWS else ("int8", "float")


def tuned_tiles(
    spec: DecoderSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    decode_rows: Collection[int],
    step_tokens: int,
    tower: Sequence[Part] = (),
    budget: float = BUDGET_S,
    enter_thread: Callable[[], None] = lambda: None,
) -> Tiles:
    """Tiles kept in `folder` for this chip; what is missing there is measured for `budget` seconds at most and kept.

    With a budget of 0 nothing is measured. Defaults, and a line in the log, where the device has no memory to measure
    in. `enter_thread` is called on each thread that uses the device. Launches and waits on the current stream, which
    must not be the default one.
    """
    plan, chip = plan_for(spec, decode_rows, step_tokens, tower), chip_of(device)
    store = TileStore(folder, chip, str(dtype).removeprefix("torch."))

    def measure(missing: Mapping[Product, Setting], known: Mapping[Product, Choice]) -> dict[Product, Choice]:
        threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
        start = time.perf_counter()
        _log.info("tuning kernels for %s, once: this takes up to %.0f s", chip.name, budget)
        with LinearBench(missing, device, dtype, threads=threads, enter_thread=enter_thread) as bench:
            found = measured(plan, missing, known, bench, chip, budget=budget, batch=2 * threads)
        _log.info("tuned %d products in %.0f s", len(found), time.perf_counter() - start)
        return found

    try:
        choices = kept_or_measured(store, plan, measure if budget > 0 else None, timeout=2 * budget)
    except torch.OutOfMemoryError:
        _log.warning("kernels are not tuned: %s has not enough free memory to measure in", device)
        choices = {}
    finally:
        torch.cuda.empty_cache()
    tiles = {product: choice.tile for product, choice in choices.items()}
    return Tiles(tiles, gemv_rows(plan, choices), bulk=chip.bulk)


Measure = Callable[[Mapping[Product, Setting], Mapping[Product, Choice]], dict[Product, Choice]]
"""Choices for products that are missing, given those that are known."""


def kept_or_measured(store: TileStore, plan: Plan, measure: Measure | None, timeout: float) -> dict[Product, Choice]:
    """What is kept, and the rest measured and kept: by one thread or process, while others wait for it `timeout` s."""
    kept = store.read(plan.settings)
    if len(kept) == len(plan.settings) or measure is None:
        return kept
    with store.alone(timeout) as alone:
        kept = store.read(plan.settings)  # somebody else may have been here
        missing = {product: setting for product, setting in plan.settings.items() if product not in kept}
        if alone and missing and store.begin():
            try:
                found = measure(missing, kept)
            except torch.OutOfMemoryError:
                store.add({})  # which says that this attempt did not end the process
                raise
            if any(choice.seconds is not None for choice in found.values()):
                store.add(found)
            kept |= found
    return kept


def measured(
    plan: Plan,
    missing: Collection[Product],
    known: Mapping[Product, Choice],
    bench: Bench,
    chip: Chip,
    *,
    budget: float,
    batch: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Product, Choice]:
    """A choice for each missing product."""
    start, compared = clock(), plan.compared
    searched = [product for product in missing if product not in compared]
    tasks = [Task(product, _choices(product, chip), plan.share(product)) for product in searched]
    found = dict(search(tasks, bench, budget=_CLIMBING * budget, batch=batch, clock=clock))
    tasks = []
    for product in (product for product in compared if product in missing):
        choices, like = _choices(product, chip), plan.like(product)
        chosen = found.get(like) or known.get(like)
        same = (chosen.tile,) if chosen and chosen.tile in choices[1:] else ()
        tasks.append(Task(product, (choices[0], *same), plan.share(product)))
    return found | dict(search(tasks, bench, budget=budget - (clock() - start), batch=batch, clock=clock))


def _choices(product: Product, chip: Chip) -> tuple[Tile, ...]:
    """Of 16-bit rows the default alone: it is compiled for whoever needs it."""
    choices = tuple(candidates(product, chip.shared_bytes, bulk=chip.bulk))
    return choices[:1] if product.kernel == "float" else choices


def gemv_rows(plan: Plan, choices: Mapping[Product, Choice]) -> int:
    """Up to how many rows a step's products are faster by GEMV than on tensor cores; GEMV_ROWS where it is not known.

    The default stays where both are about as fast.
    """
    most = 1
    for rows in sorted({product.rows for product in plan.settings if 1 < product.rows <= MOST_GEMV_ROWS}):
        by_gemv, by_int8 = (_step_seconds(plan, choices, kernel, rows) for kernel in ("gemv", "int8"))
        if by_gemv is None or by_int8 is None:
            break
        if by_gemv > by_int8 * (GAIN if rows <= GEMV_ROWS else 1 / GAIN):
            return most
        most = rows
    return max(most, GEMV_ROWS)


def _step_seconds(plan: Plan, choices: Mapping[Product, Choice], kernel: Kernel, rows: int) -> float | None:
    """Of all linear layers that see so many rows."""
    total = 0.0
    for part in plan.parts:
        if part.product(kernel, rows) not in plan.settings:
            continue
        choice = choices.get(part.product(kernel, rows))
        if choice is None or choice.seconds is None:
            return None
        total += part.count * choice.seconds
    return total


def chip_of(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    return Chip(
        name=properties.name,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        bulk=copies_in_bulk(device),
        torch=torch.__version__,
        triton=triton.__version__,
        sources=_sources(),
    )


def _sources() -> str:
    """Of whatever a time depends on, and of what measured it."""
    here, digest = Path(__file__).parent, hashlib.sha256()
    for name in _SOURCES:
        path = here / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
