"""`bench kernels`: each fused kernel against what it replaces and its own limit; then decode steps, part by part."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.benches import limits, options, step_ladder
from cli.benches.in_process import decoder_spec, storage_folder
from cli.benches.report import BenchError, Report, Row, attempt
from cli.benches.shapes import BUNDLED, shape_config
from cli.benches.step_work import Work, in_step
from cli.settings import add_device_settings, settings_from
from engine.config import EngineConfig
from engine.device import resolve
from engine.families import CheckpointConfig, family_for
from engine.spec import DecoderSpec, FloatType

if TYPE_CHECKING:
    import torch

    from cli.benches.device_time import Timer
    from cli.benches.kernel_pairs import Pair, Place
    from engine.kernels.tiles import Tiles

COLUMNS = (
    ("in a step", "count"),
    ("us", "us"),
    ("replaced us", "replaced_us"),
    ("limit us", "limit_us"),
    ("step p50 ms", "step_ms.median"),
    ("p99", "step_ms.p99"),
    ("tok/s", "tokens_per_s"),
    ("limit ms", "limit_ms"),
    ("share", "share"),
    ("times", "times"),
    ("kernel", "kernel"),
)
NOTES = (
    "products keep their norms, gates and residuals: no row without them",
    "what attention replaces is a stand-in: torch's, contiguous, without rotary embedding and cache write",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_shape(parser)
    add_device_settings(parser)
    options.add_steps(parser, batch="1,8,32,128")
    parser.add_argument("--steps", type=int, default=64, help="decode steps per row of the ladder (default: 64)")
    parser.add_argument("--only", choices=["kernels", "ladder"], help="one of the two tables")
    parser.add_argument("--no-tuning", action="store_true", help="tiles that were measured before, or the default ones")
    parser.set_defaults(sampling="greedy", profile=False)


def measure(arguments: argparse.Namespace) -> Report:
    if arguments.kernel_fusion:
        raise BenchError("bench kernels measures with and without; leave --kernel-fusion out")
    (context,) = arguments.context
    index = _gpu(arguments)
    report = Report([], {"device": f"cuda:{index}"})
    with storage_folder(arguments) as storage:
        if arguments.only != "ladder":
            report.card["notes"] = list(NOTES)
            report.rows.extend(_kernels(arguments, storage, index, context, report.card))
        if arguments.only != "kernels":
            report.rows.extend(step_ladder.rows(arguments, storage, report.card))
    return report


def _gpu(arguments: argparse.Namespace) -> int:
    """The GPU that the settings choose. Raises BenchError without one."""
    devices = resolve(EngineConfig.from_mapping(settings_from(arguments)))
    if len(devices.gpus) != 1:
        reason = devices.reason or "--device cuda:0 names one"
        raise BenchError(f"bench kernels measures one CUDA device, not {len(devices.gpus)}: {reason}")
    return devices.gpus[0].index


def _spec(arguments: argparse.Namespace, storage: Path) -> tuple[DecoderSpec, FloatType]:
    """The decoder, which needs none of its weights here, and the type of its checkpoint."""
    if arguments.shape == BUNDLED:
        return decoder_spec(BUNDLED, storage), "float32"
    config = shape_config(arguments.shape, options.decoder_part(arguments))
    spec = family_for(config).spec(CheckpointConfig(model=config, generation={}, preprocessor={}))
    return spec.decoder, spec.dtype


def _kernels(arguments: argparse.Namespace, storage: Path, index: int, context: int, card: dict[str, Any]) -> list[Row]:
    """The rows of each batch size and their sums; the chip's rates go to the card."""
    import torch

    from cli.benches.device_time import GraphTimer
    from cli.benches.kernel_pairs import cuda_place
    from engine.runners.open_cuda import activation_type, kv_block_size
    from engine.runtime.cuda.weights import torch_type

    spec, stored = _spec(arguments, storage)
    device, activations = torch.device("cuda", index), activation_type("int8", stored)
    dtype, timer, block = torch_type(activations), GraphTimer(device), kv_block_size(spec.head_dim)
    torch.cuda.set_device(device)
    rates = Rates(limits.measure_rates(str(device), "int8"), limits.measure_rates(str(device), "fp16"))
    card |= {"activations": activations} | rates.card()
    rows: list[Row] = []
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        tiles = _tiles(arguments, spec, storage, device, dtype)
        for batch in arguments.batch:
            place = cuda_place(spec, device, dtype, tiles, block_size=block, rows=batch, context=context)
            rows += batch_rows(spec, place, batch, context, timer, rates)
            torch.cuda.empty_cache()
    return rows


def _tiles(
    arguments: argparse.Namespace, spec: DecoderSpec, storage: Path, device: torch.device, dtype: torch.dtype
) -> Tiles:
    """What the ladder's engines take: kept ones, which are measured now if there are none."""
    from engine.kernels import tuning
    from engine.runners.fusion import FOLDER
    from engine.runtime.cuda.buckets import Buckets
    from engine.runtime.cuda.capture import allow_beside_capture

    most = max(arguments.batch)
    return tuning.tuned_tiles(
        spec,
        device=device,
        dtype=dtype,
        folder=storage / FOLDER,
        decode_rows={bucket.batch for bucket in Buckets(most, spec.context_length)},
        step_tokens=arguments.prefill_chunk + most,
        budget=0.0 if arguments.no_tuning else tuning.BUDGET_S,
        enter_thread=allow_beside_capture,
    )


class Rates:
    """The chip's, for products of int8 and of 16 bits."""

    def __init__(self, int8: limits.Rates, wide: limits.Rates) -> None:
        self._int8, self._wide = int8, wide

    def limit_s(self, work: Work) -> float:
        return (self._int8 if work.operands == "int8" else self._wide).limit_s(work.cost)

    def card(self) -> dict[str, Any]:
        int8, wide = self._int8.card(), self._wide.card()
        names = {"copy_gb_per_s": wide["copy_gb_per_s"]}
        return names | {f"{one['matmul']}_tflop_per_s": one["matmul_tflop_per_s"] for one in (int8, wide)}


def batch_rows(spec: DecoderSpec, place: Place, batch: int, context: int, timer: Timer, rates: Rates) -> list[Row]:
    """A row for each kernel, and one for a step with either cache."""
    from cli.benches.kernel_pairs import pairs

    measured: list[tuple[Work, Row]] = []
    for work, make in pairs(spec, place, batch, context):
        row = attempt(f"B={batch} {work.name}", partial(_pair_row, work, make, timer, rates.limit_s(work)))
        measured.append((work, row))
    return [row for _, row in measured] + step_rows(measured, batch)


def _pair_row(work: Work, make: Callable[[], Pair], timer: Timer, limit_s: float) -> Row:
    pair = make()
    replaced, ours = (timer(launch, pair.copies) for launch in (pair.replaced, pair.ours))
    sizes: Row = {"count": work.count, **asdict(work.cost), "kernel": pair.kernel, "replaces": pair.replaces}
    return sizes | _against(ours, replaced, limit_s)


def step_rows(measured: Sequence[tuple[Work, Row]], batch: int) -> list[Row]:
    """What a step's kernels take one after the other, by the type of the cache; 28 layers are 28 times a layer."""
    rows, by_name = list[Row](), {work.name: row for work, row in measured}
    for int8, name in ((False, "16-bit cache"), (True, "int8 cache")):
        works = in_step([work for work, _ in measured], int8_cache=int8)
        counted = [(work.count, by_name[work.name]) for work in works]
        title = f"B={batch} step, {name}"
        if missing := [work.name for work in works if "error" in by_name[work.name]]:
            rows.append({"row": title, "error": f"not measured: {', '.join(missing)}"})
            continue
        ours, replaced, limit = (_sum(counted, key) for key in ("us", "replaced_us", "limit_us"))
        row: Row = {"row": title, "count": sum(count for count, _ in counted)}
        rows.append(row | _against(ours / 1e6, replaced / 1e6, limit / 1e6))
    return rows


def _sum(counted: Iterable[tuple[int, Row]], key: str) -> float:
    return float(sum(count * row[key] for count, row in counted))


def _against(ours_s: float, replaced_s: float, limit_s: float) -> Row:
    """Microseconds; `share` of the limit that ours reaches, `times` that it is faster."""
    micro = {"us": ours_s, "replaced_us": replaced_s, "limit_us": limit_s}
    rounded: Row = {name: round(1e6 * seconds, 3) for name, seconds in micro.items()}
    return rounded | {"share": round(limit_s / ours_s, 4), "times": round(replaced_s / ours_s, 2)}
