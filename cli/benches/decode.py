"""`bench decode`: what a step takes while exactly B sequences decode, scheduling and sampling included."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from cli.benches import limits, options, profile
from cli.benches.in_process import TIMEOUT_S, Bench, Work, cancel, open_bench, storage_folder, submit
from cli.benches.report import Report, Row, attempt
from cli.measured import distribution
from engine.request import SamplingParams
from engine.stats import StepRecord

_POLL_S = 0.001
WARM_UP = 8  # steps at full batch before the measured ones: graphs are captured, clocks go up
MIXED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 50},
    {"temperature": 0.8, "min_p": 0.05, "seed": 7},
    {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.2},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02, "frequency_penalty": 0.2, "seed": 11},
)
_FIELDS = {
    "name": {"type": "string", "minLength": 8, "maxLength": 60},
    "kind": {"enum": ["invoice", "receipt", "letter", "form"]},
    "total": {"type": "number", "minimum": 0, "maximum": 100000},
    "paid": {"type": "boolean"},
    "lines": {"type": "array", "items": {"type": "string", "minLength": 4, "maxLength": 20}, "maxItems": 4},
}
_ITEMS = 1000  # more than any row has time for
SCHEMA = json.dumps(
    {
        "type": "array",
        "items": {"type": "object", "properties": _FIELDS, "required": [*_FIELDS], "additionalProperties": False},
        "minItems": _ITEMS,
    }
)
"""What people ask for: objects of texts, words from a list, numbers and lists; so many that no answer ends."""


COLUMNS = (
    ("context", "context"),
    ("step p50 ms", "step_ms.median"),
    ("p99", "step_ms.p99"),
    ("host p50", "host_ms.median"),
    ("device p50", "device_ms.median"),
    ("tok/s", "tokens_per_s"),
    ("limit ms", "limit_ms"),
    ("share", "share"),
    ("overhead", "overhead"),
    ("of means", "overhead_mean"),
    ("kernels/wall", "profile.kernel_share"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_engine(parser)
    options.add_steps(parser)
    parser.add_argument("--steps", type=int, default=64, help="steps per row (default: 64)")
    parser.add_argument(
        "--sampling",
        choices=["greedy", "mixed", "constrained"],
        default="greedy",
        help="constrained: every sequence by a JSON schema, each row against the same one without (default: greedy)",
    )
    parser.add_argument("--profile", action="store_true", help="trace kernels (CUDA) after each row's timed steps")
    parser.add_argument("--rival", choices=["transformers"], help="measure the same work with another engine as well")


def measure(arguments: argparse.Namespace) -> Report:
    """One row per batch size, the weights loaded once. With several devices each of them decodes so many sequences."""
    settings = {"prefill_chunk": arguments.prefill_chunk, "max_waiting": 1024}
    part = options.decoder_part(arguments)
    with storage_folder(arguments) as storage:
        with open_bench(arguments, storage, part, settings, room(arguments), max(arguments.batch)) as bench:
            rates = limits.measure_rates(bench.device, bench.model.artifact.precision)
            rows = [row for batch in arguments.batch for row in _rows(arguments, bench, rates, batch)]
            report = Report(rows, bench.card() | rates.card())
            folder = bench.model.folder
        if arguments.rival:  # after the engine has given its memory back
            from cli.benches import rival  # imports torch

            report.rows.extend(rival.rows(arguments, folder, report.card))
    return report


def room(arguments: argparse.Namespace) -> int:
    """Tokens that a sequence may come to while its row is measured."""
    (context,) = arguments.context
    return int(context + 2 * (arguments.steps + WARM_UP) + 64)


def _rows(arguments: argparse.Namespace, bench: Bench, rates: limits.Rates, batch: int) -> list[Row]:
    """One, or with constrained sampling first what it is compared with; `overhead` is its share of that one's median
    step, `overhead_mean` of the mean, in which the few long steps count too."""
    name = f"B={batch}"
    if arguments.sampling != "constrained":
        return [attempt(name, partial(measure_batch, arguments, bench, rates, batch))]
    free, constrained = (
        attempt(
            f"{name} {sampling}",
            partial(measure_batch, argparse.Namespace(**vars(arguments) | {"sampling": sampling}), bench, rates, batch),
        )
        for sampling in ("greedy", "constrained")
    )
    if "error" not in free and "error" not in constrained:
        for field, part in (("overhead", "median"), ("overhead_mean", "mean")):
            constrained[field] = round(constrained["step_ms"][part] / free["step_ms"][part] - 1, 4)
    return [free, constrained]


def measure_batch(arguments: argparse.Namespace, bench: Bench, rates: limits.Rates, batch: int) -> Row:
    """One row: `batch` sequences on each device. Raises BenchError and EngineError."""
    bench.steps.records.clear()
    work: list[Work] = []
    wanted = WARM_UP + arguments.steps
    try:
        for tokens, sampling in zip(_prompt_tokens(arguments, batch), _sampling(arguments, batch), strict=True):
            for _ in bench.devices:
                text = bench.prompts.text(max(bench.prompts.shortest, tokens))
                work.append(submit(bench.engine, bench.model.name, text, sampling))
                _wait_placed(bench, len(work))
        records = bench.steps.wait(SteadySteps(batch, bench.devices, wanted), work)
        traced = {"profile": profile.trace_steps(bench.steps, work)} if arguments.profile else {}
    finally:
        cancel(bench.engine, work)
    measured = [pair for device in bench.devices for pair in _of_device(records, device, batch)[WARM_UP:wanted]]
    return summary(bench, rates, batch, measured) | traced


def _wait_placed(bench: Bench, count: int) -> None:
    """With several devices, until all so far belong to one: two that choose theirs at once may choose the same."""
    replicas = [replica for replica, _ in bench.model.replicas]
    deadline = time.monotonic() + TIMEOUT_S
    while len(replicas) > 1 and sum(replica.load for replica in replicas) < count and time.monotonic() < deadline:
        time.sleep(_POLL_S)


class SteadySteps:
    """Whether every device has had so many steps that `steady` counts; called with each record once."""

    def __init__(self, batch: int, devices: Sequence[str], wanted: int) -> None:
        self._batch = batch
        self._left = dict.fromkeys(devices, wanted)
        self._before = dict.fromkeys(devices, False)

    def __call__(self, record: StepRecord) -> bool:
        now = _only_decodes(record, self._batch)
        self._left[record.device] -= now and self._before[record.device]
        self._before[record.device] = now
        return all(left <= 0 for left in self._left.values())


def _of_device(records: Sequence[StepRecord], device: str, batch: int) -> list[tuple[float, StepRecord]]:
    return steady([record for record in records if record.device == device], batch)


def steady(records: Sequence[StepRecord], batch: int) -> list[tuple[float, StepRecord]]:
    """Steps in which `batch` sequences decoded and nothing else ran, after such a step: seconds between the two."""
    pairs = itertools.pairwise(records)
    return [(b.finished_s - a.finished_s, b) for a, b in pairs if _only_decodes(a, batch) and _only_decodes(b, batch)]


def _only_decodes(record: StepRecord, batch: int) -> bool:
    return record.decode_rows == batch and not record.prefill_tokens and not record.images


def summary(
    bench: Bench, rates: limits.Rates, batch: int, measured: Sequence[tuple[float, StepRecord]]
) -> dict[str, Any]:
    """Times in milliseconds; `share` is the part of the physical limit that the median step reached."""
    times, records = [time for time, _ in measured], [record for _, record in measured]
    step = distribution(times)
    assert step is not None, "at least one step is measured"
    context = sum(record.context_tokens for record in records) // len(records)
    cost = limits.decode_cost(bench.model.artifact, batch, context, bench.kv_bytes_per_token)
    device = [record.device_s for record in records if record.device_s is not None]
    return {
        "batch": batch,
        "context": round(context / batch),
        "steps": len(measured),
        "step_ms": step,
        "host_ms": distribution([record.host_s for record in records]),
        "device_ms": distribution(device),
        "devices": len(bench.devices),
        "tokens_per_s": round(1e3 * batch * len(bench.devices) / step["median"], 1),
        **cost.against(rates, step["median"] / 1e3),
    }


def _prompt_tokens(arguments: argparse.Namespace, batch: int) -> Iterator[int]:
    """Lengths such that all sequences have about `context` tokens half-way through the measured steps: the first ones
    decode while the others' prompts are computed, so they start shorter. The first step that counts is the second of
    its kind, behind the first token, which prefill gives."""
    (context,) = arguments.context
    half = WARM_UP + arguments.steps // 2 + 2
    for number in range(batch):
        ahead = math.ceil((batch - 1 - number) * context / arguments.prefill_chunk)
        yield context - half - ahead


_SAMPLING: dict[str, tuple[dict[str, Any], ...]] = {
    "greedy": ({},),
    "mixed": MIXED,
    "constrained": ({"json_schema": SCHEMA},),
}


def _sampling(arguments: argparse.Namespace, batch: int) -> Iterator[SamplingParams]:
    """All of a row's requests outlive its measurement."""
    kinds = _SAMPLING[arguments.sampling]
    for number in range(batch):
        kind = kinds[number % len(kinds)]
        yield SamplingParams(**kind, max_tokens=1 << 20, ignore_eos="json_schema" not in kind)
