"""What int8 costs a text model's predictions, part by part, computed by transformers in place of the engine.

    python -m tools.ablate_int8 CHECKPOINT [--windows 8] > result.json

Perplexities in fp16, with int8 weights and 16-bit activations (W8A16), with int8 activations everywhere (W8A8), and
with 16-bit activations where the engine's rule leaves them; and the divergence that rounding each layer causes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from cli.machine import card
from engine.checkpoints import Checkpoint
from engine.checkpoints.quantise import quantise_rows
from engine.graphs.cuda.rounded import linear_names
from engine.prompts.tokenizer import Tokenizer
from engine.runners.calibration import calibration_step
from engine.runners.float_inputs import BUDGET, choose_float_inputs, mean_divergence
from engine.spec import DecoderSpec
from evaluation.perplexity import Perplexity, Tokens, perplexity, text, windows

WINDOW = 1024
Type = Literal["fp32", "fp16", "int8"]
_MODULES = {"qkv": ("q", "k", "v"), "out": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Through int8 and back, one scale for each token, half to even."""
    step = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return torch.round(x / step) * step


def modules(name: str) -> list[str]:
    """transformers' names of one of the engine's linear layers."""
    if name in ("embedding", "head"):
        return ["lm_head"]
    _, layer, part = name.split(".")
    block = "self_attn" if part in ("qkv", "out") else "mlp"
    return [f"model.layers.{layer}.{block}.{module}_proj" for module in _MODULES[part]]


class Model:
    """A transformers model whose linear layers compute as they are told."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        linears = {name: module for name, module in self._model.named_modules() if isinstance(module, torch.nn.Linear)}
        self._exact = {name: module.weight.data for name, module in linears.items()}
        self._int8 = {name: _dequantised(weight) for name, weight in self._exact.items()}
        self.weights: Type = "fp32"
        self.rounded: Collection[str] = ()  # transformers' names of layers whose activations go through int8
        for name, module in linears.items():
            module.forward = self._forward(name, module)  # type: ignore[method-assign]
        embedding: Any = self._model.get_input_embeddings()
        self._tables = {"exact": embedding.weight.data, "int8": _dequantised(embedding.weight.data)}
        embedding.forward = lambda ids: self._tables.get(self.weights, self._tables["exact"])[ids]

    def _forward(self, name: str, module: torch.nn.Linear) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            weight = self._int8[name] if self.weights == "int8" else self._exact[name]
            if self.weights == "fp16":
                return torch.nn.functional.linear(x.half().float(), weight.half().float(), module.bias).half().float()
            return torch.nn.functional.linear(rounded(x) if name in self.rounded else x, weight, module.bias)

        return forward

    def logits(self, tokens: Tokens) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = self._model(torch.from_numpy(tokens)[None]).logits[0]
        return found

    def perplexity(self, weights: Type, rounded: Collection[str], pieces: list[Tokens]) -> Perplexity:
        """`rounded` are the engine's names."""
        self.weights, self.rounded = weights, {module for name in rounded for module in modules(name)}
        return perplexity(self._chunks, pieces)

    def divergence(self, exact: torch.Tensor, rounded: Collection[str], tokens: Tokens) -> float:
        self.rounded = {module for name in rounded for module in modules(name)}
        return mean_divergence(exact, self.logits(tokens))

    def _chunks(self, tokens: Tokens) -> Iterator[NDArray[np.float32]]:
        yield self.logits(tokens).numpy()


def _dequantised(weight: torch.Tensor) -> torch.Tensor:
    values, scale = quantise_rows(weight.numpy())
    return torch.from_numpy(values.astype(np.float32) * scale[:, None])


def ablation(model: Model, spec: DecoderSpec, calibration: Tokens, pieces: list[Tokens]) -> dict[str, Any]:
    names = linear_names(spec)
    found = choice(model, spec, calibration)
    chosen = frozenset(found["float_inputs"])
    reference = model.perplexity("fp16", (), pieces)
    rows: dict[str, tuple[Type, Collection[str]]] = {
        "fp32": ("fp32", ()),
        "W8A16": ("int8", ()),
        "W8A8 everywhere": ("int8", names),
        "W8A8 by the rule": ("int8", frozenset(names) - chosen),
    }
    table: dict[str, Any] = {"fp16": {"perplexity": reference.value}}
    for label, (weights, rounded_layers) in rows.items():
        measured = model.perplexity(weights, rounded_layers, pieces)
        ratio, interval = measured.ratio_to(reference)
        table[label] = {"perplexity": measured.value, "ratio_to_fp16": ratio, "interval_95": interval}
        print(label, table[label], file=sys.stderr)
    return {"perplexities": table, "rule": found}


def choice(model: Model, spec: DecoderSpec, calibration: Tokens) -> dict[str, Any]:
    """What the rule leaves in 16 bits, and what it saw: divergences in nats a token on the built-in text."""
    names = linear_names(spec)
    model.weights, model.rounded = "int8", ()
    exact = model.logits(calibration)
    seen: dict[frozenset[str], float] = {}

    def divergence(rounded_layers: frozenset[str]) -> float:
        seen[rounded_layers] = model.divergence(exact, rounded_layers, calibration)
        return seen[rounded_layers]

    sizes = {name: _size(spec, name) for name in names}
    chosen = choose_float_inputs(sizes, divergence)
    alone = {name: seen[one] for name in names if (one := frozenset([name])) in seen}
    kinds: dict[str, float] = defaultdict(float)
    for name, cost in alone.items():
        kinds[name.rpartition(".")[2]] += cost
    rest = frozenset(names) - chosen
    return {
        "budget": BUDGET,
        "everywhere": seen[frozenset(names)],
        "sum_of_layers": sum(alone.values()),
        "sum_by_kind": dict(kinds),
        "by_the_rule": seen.get(rest, seen[frozenset(names)]),
        "int8_share_of_multiplications": sum(sizes[name] for name in rest) / sum(sizes.values()),
        "float_inputs": sorted(chosen),
        "layers": alone,
    }


def _size(spec: DecoderSpec, name: str) -> int:
    attended = spec.heads * spec.head_dim
    match name.rpartition(".")[2]:
        case "qkv":
            return (attended + 2 * spec.kv_heads * spec.head_dim) * spec.hidden
        case "out":
            return spec.hidden * attended
        case "gate_up":
            return 2 * spec.intermediate * spec.hidden
        case "down":
            return spec.hidden * spec.intermediate
        case _:
            return spec.vocab * spec.hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens each")
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.checkpoint)
    ids = np.array(Tokenizer.load(arguments.checkpoint).encode(text()), np.int64)
    pieces = windows(ids, WINDOW, arguments.windows)
    calibration = calibration_step(arguments.checkpoint, checkpoint.spec, None).ids.astype(np.int64)
    found = ablation(Model(arguments.checkpoint), checkpoint.spec.decoder, calibration, pieces)
    facts = {"machine": card(), "checkpoint": arguments.checkpoint.name, "windows": len(pieces), "window": WINDOW}
    print(json.dumps(facts | found, indent=1))


if __name__ == "__main__":
    main()
