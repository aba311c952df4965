"""`bench prefill`: how long new prompts take to their first token, through the engine's own steps."""

from __future__ import annotations

import argparse
import statistics
from functools import partial

from cli.benches import limits, options, profile
from cli.benches.in_process import Bench, finish, open_bench, storage_folder, submit
from cli.benches.report import Report, Row, attempt
from cli.measured import distribution
from engine.request import SamplingParams
from engine.stats import StepRecord

WARM_UP = 2  # rounds of their own prompts
TRACED = 4  # rounds
COLUMNS = (
    ("steps", "steps"),
    ("p50 ms", "prefill_ms.median"),
    ("p99", "prefill_ms.p99"),
    ("ms/step", "step_ms.median"),
    ("tok/s", "tokens_per_s"),
    ("TFLOP/s", "tflop_per_s"),
    ("limit ms", "limit_ms"),
    ("share", "share"),
    ("kernels/wall", "profile.kernel_share"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_engine(parser)
    options.add_steps(parser)
    parser.add_argument("--rounds", type=int, default=8, help="measurements per row (default: 8)")
    parser.add_argument("--profile", action="store_true", help="trace kernels (CUDA) after each row's timed rounds")


def measure(arguments: argparse.Namespace) -> Report:
    """A row for each batch size and prompt length."""
    settings = {"prefill_chunk": arguments.prefill_chunk}
    longest, most = max(arguments.context), max(arguments.batch)
    with (
        storage_folder(arguments) as storage,
        open_bench(arguments, storage, options.decoder_part(arguments), settings, longest + 1, most) as bench,
    ):
        rates = limits.measure_rates(bench.device, bench.model.artifact.precision)
        rows = [
            attempt(f"B={batch} x {tokens}", partial(_measure, arguments, bench, rates, batch, tokens))
            for batch in arguments.batch
            for tokens in arguments.context
        ]
        return Report(rows, bench.card() | rates.card())


def _measure(arguments: argparse.Namespace, bench: Bench, rates: limits.Rates, batch: int, tokens: int) -> Row:
    rounds = [_round(bench, batch, tokens) for _ in range(WARM_UP + arguments.rounds)][WARM_UP:]
    traced = {}
    if arguments.profile:
        traced["profile"] = profile.trace_work(lambda: [_round(bench, batch, tokens) for _ in range(TRACED)])
    times = [records[-1].finished_s - records[0].started_s for records in rounds]
    steps = [record.finished_s - record.started_s for records in rounds for record in records]
    median = statistics.median(times)
    cost = limits.prefill_cost(bench.model.artifact, batch, tokens, bench.kv_bytes_per_token)
    return {
        "batch": batch,
        "tokens": tokens,
        "steps": round(len(steps) / len(rounds), 1),
        "prefill_ms": distribution(times),
        "step_ms": distribution(steps),
        "tokens_per_s": round(batch * tokens / median),
        "tflop_per_s": round(cost.operations / median / 1e12, 3),
        **cost.against(rates, median),
        **traced,
    }


def _round(bench: Bench, batch: int, tokens: int) -> list[StepRecord]:
    """The steps that computed `batch` new prompts, none of which is in the prefix index."""
    texts = [bench.prompts.text(tokens) for _ in range(batch)]
    bench.steps.records.clear()
    work = [submit(bench.engine, bench.model.name, text, SamplingParams(max_tokens=1)) for text in texts]
    finish(work)
    left = batch * tokens

    def all_there(record: StepRecord) -> bool:
        nonlocal left
        left -= record.prefill_tokens
        return left <= 0

    records = bench.steps.wait(all_there, [])
    return [record for record in records if record.prefill_tokens]
