"""The same decode work with transformers, the same weights, greedy: eager, and compiled with a static cache."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, StaticCache

from cli.benches.report import BenchError, Row, attempt
from cli.measured import distribution

WARM_UP = 4
COMPILE_LIMIT_S = 120.0
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _TakesTooLong(BaseException):
    """Not an Exception: the compiler would swallow it."""


def rows(arguments: argparse.Namespace, folder: Path, card: Mapping[str, Any]) -> Iterator[Row]:
    """Two rows per batch size. Where the engine runs int8, transformers runs 16 bit (fp32 on a CPU)."""
    device = torch.device("cuda" if str(card["device"]).startswith("cuda") else "cpu")
    dtype = _DTYPES.get(card["precision"], torch.float16 if device.type == "cuda" else torch.float32)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the engine's tensors left with torch
    model = load(folder, dtype, device)
    (context,) = arguments.context
    name = f"transformers {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        for measured, kind in ((eager_row, "eager"), (compiled_row, "compiled")):
            for batch in arguments.batch:
                row = attempt(f"{name} {kind} B={batch}", partial(measured, model, batch, context, arguments.steps))
                if "error" in row:  # what it cannot do says nothing about the engine
                    row["skipped"] = row.pop("error")
                yield row


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The checkpoint that the engine ran, as transformers reads it."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto = AutoModelForImageTextToText if "vision_config" in kind else AutoModelForCausalLM
    model: Any = auto.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def eager_row(model: Any, batch: int, context: int, steps: int) -> Row:
    """With the cache that `generate` uses by default, which grows."""
    cache = DynamicCache(config=model.config.get_text_config())
    token = _prefill(model, cache, batch, context - steps // 2)

    def step() -> None:
        nonlocal token
        token = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    return _timed(model, step, batch, context, steps)


def compiled_row(model: Any, batch: int, context: int, steps: int) -> Row:
    """torch.compile of the step in mode reduce-overhead, with a cache of fixed size."""
    text = model.config.get_text_config()
    cache = StaticCache(config=text, max_cache_len=context + steps + WARM_UP)
    token = _prefill(model, cache, batch, context - steps // 2)

    def forward(token: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    torch.compiler.reset()
    compiled = torch.compile(forward, mode="reduce-overhead")

    def step() -> None:
        nonlocal token
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        token = compiled(token).clone()

    with _limited(COMPILE_LIMIT_S):
        for _ in range(WARM_UP):
            step()
        _synchronise(model)
    return _timed(model, step, batch, context, steps, warm_up=0)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises BenchError in the main thread when time is up."""

    def stop(*_: object) -> None:
        raise _TakesTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TakesTooLong:
        raise BenchError(f"compiling takes over {seconds:.0f} s; not measured") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _prefill(model: Any, cache: Any, batch: int, tokens: int) -> torch.Tensor:
    """One sequence at a time would measure nothing else; this only fills the cache."""
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, min(256, vocab), (batch, tokens), device=model.device)
    token: torch.Tensor = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    return token


def _timed(model: Any, step: Callable[[], None], batch: int, context: int, steps: int, warm_up: int = WARM_UP) -> Row:
    """Each step waits for its tokens, as an engine does that sends them."""
    times = []
    for number in range(warm_up + steps):
        started = time.perf_counter()
        step()
        _synchronise(model)
        if number >= warm_up:
            times.append(time.perf_counter() - started)
    found = distribution(times)
    assert found is not None, "at least one step is measured"
    rate = round(1e3 * batch / found["median"], 1)
    return {"batch": batch, "context": context, "steps": steps, "step_ms": found, "tokens_per_s": rate}


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
