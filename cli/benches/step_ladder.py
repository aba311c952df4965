"""Decode steps through the engine with one part after the other exchanged for ours: from ONNX Runtime's own operators
in 16 bits to all that is fused, and the sampler in torch to that in kernels.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cli.benches import decode, limits, options
from cli.benches.in_process import Bench, open_bench
from cli.benches.report import BenchError, Row, attempt
from engine.errors import EngineError
from engine.graphs.cuda.fused import Fusion
from engine.spec import Precision

NOTE = "norms are part of our int8 linear layers, so they come in one step"


@dataclass(frozen=True, slots=True)
class Rung:
    """What runs; the setting `kernel_fusion` has no part in it."""

    name: str
    precision: Precision
    fusion: Fusion
    torch_sampling: bool = True


RUNGS = (
    Rung("stock fp16", "fp16", Fusion(linear=False, attention=False)),
    Rung("stock int8", "int8", Fusion(linear=False, attention=False)),
    Rung("+ int8 linear with norms", "int8", Fusion(linear=True, attention=False)),
    Rung("+ attention", "int8", Fusion(linear=True, attention=True)),
    Rung("+ sampling", "int8", Fusion(linear=True, attention=True), torch_sampling=False),
)


def rows(arguments: argparse.Namespace, storage: Path, card: dict[str, Any]) -> list[Row]:
    """A row for each rung and batch size, a rung's weights loaded once; what each occupied goes to the card.

    `times` is how often a row's step fits into the first rung's of that batch.
    """
    card |= {"ladder": NOTE, "memory": []}
    found: list[Row] = []
    for rung in RUNGS:
        found += _rung_rows(arguments, storage, rung, card)
        gc.collect()  # the engine is closed: what is left of it on the device goes now
    first = {row["batch"]: row["step_ms"]["median"] for row in found if row.get("rung") == RUNGS[0].name}
    for row in found:
        if row.get("batch") in first:
            row["times"] = round(first[row["batch"]] / row["step_ms"]["median"], 2)
    return found


def _rung_rows(arguments: argparse.Namespace, storage: Path, rung: Rung, card: dict[str, Any]) -> list[Row]:
    """One that cannot be opened leaves the others."""
    from engine.runners.fusion import Parts  # these import torch
    from engine.runners.open_cuda import open_cuda

    chosen = argparse.Namespace(**vars(arguments) | {"precision": rung.precision, "kernel_fusion": None})
    settings = {"prefill_chunk": arguments.prefill_chunk, "max_waiting": 1024}
    part, context = options.decoder_part(arguments), decode.room(arguments)
    parts = Parts(rung.fusion, torch_sampling=rung.torch_sampling, tuning=not arguments.no_tuning)
    opened = partial(open_cuda, parts=parts)
    try:
        with open_bench(chosen, storage, part, settings, context, max(arguments.batch), opened) as bench:
            rates = limits.measure_rates(bench.device, rung.precision)
            card["memory"] += [{"row": rung.name, **entry} for entry in bench.card()["memory"]]
            return [_row(chosen, bench, rates, rung, batch) for batch in arguments.batch]
    except (BenchError, EngineError) as error:
        return [{"row": rung.name, "error": f"{type(error).__name__}: {error}"}]


def _row(arguments: argparse.Namespace, bench: Bench, rates: limits.Rates, rung: Rung, batch: int) -> Row:
    row = attempt(f"B={batch} {rung.name}", partial(decode.measure_batch, arguments, bench, rates, batch))
    return row if "error" in row else row | {"rung": rung.name, "precision": rung.precision}
