"""Trains the demo model from scratch, in runs of a few minutes that can be continued.

    python -m tools.train_demo OUTPUT --minutes 8              # a first run
    python -m tools.train_demo OUTPUT --minutes 8              # goes on from what OUTPUT holds
    python -m tools.train_demo OUTPUT --minutes 0              # only measures what OUTPUT holds
    python -m tools.train_demo OUTPUT --shrink-from CHECKPOINT # starts from a model with a larger vision tower

OUTPUT receives `state/` (weights in fp32, the optimisers' state, the count of steps), `model/` (the checkpoint in fp16,
as transformers loads it), `log.jsonl`, and after the run `report.json` with the accuracy on easy-vqa's test split and
on 1,000 printed words that training never saw. Every run warms up, holds the learning rate and lets it fall to zero, so
that every run ends with a usable model.

Needs the packages easy-vqa and trdg (`pip install --no-deps trdg==1.8.0`). One H100 with 15 processes drawing images
sees about 15,000 images a second, 7,000 of them new.
"""

import argparse
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Full, Queue

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Idefics3ForConditionalGeneration

from evaluation import easy_vqa, printed_words
from tools.demo_check import accuracy, cross_entropy, image_features, int8_linear_layers, logits
from tools.demo_data import LENGTHS, DemoBatches, warm_caches
from tools.demo_model import new_model, write_checkpoint
from tools.demo_shrink import shrunk
from tools.muon import Muon

Batch = dict[str, Tensor]
SHARD_BYTES = 15 * 2**20
KEPT_BATCHES = 48
"""Batches kept on the device. A batch is used again when drawing new ones falls behind."""
SAVE_SECONDS = 120


class Training:
    """The model, its two optimisers and how far it has come; saved and restored as one."""

    def __init__(self, device: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = new_model()
        self.model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps the method untyped
        matrices, rest = split_parameters(self.model)
        self.muon = Muon(matrices.values())
        self.adam = torch.optim.AdamW(rest.values(), betas=(0.9, 0.98), weight_decay=0.01, fused=device == "cuda")
        self.rest = rest
        self.steps = 0
        self.runs = 0

    def step(self, batch: Batch, muon_rate: float, adam_rate: float) -> Tensor:
        """One step on one batch; the loss stays on the device."""
        with torch.autocast(self.model.device.type, torch.bfloat16):
            scores = logits(self.model, image_features(self.model, batch["pixels"]), batch)
            loss = cross_entropy(scores, batch["labels"])
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.rest.values(), 1.0)
        self.muon.step(muon_rate)
        for group in self.adam.param_groups:
            group["lr"] = adam_rate
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self.steps += 1
        return loss.detach()

    def save(self, output: Path) -> None:
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for shape, momentum in self.muon.momenta.items():
            tensors[f"muon.{shape[0]}x{shape[1]}"] = momentum.bfloat16()
        for name, parameter in self.rest.items():
            for key, value in self.adam.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        save_sharded({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, output / "state")
        (output / "state" / "progress.json").write_text(json.dumps({"steps": self.steps, "runs": self.runs}))
        write_checkpoint(self.model, output / "model")

    @torch.no_grad()
    def restore(self, output: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for shard in sorted((output / "state").glob("*.safetensors")):
            tensors |= load_file(shard)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
        for shape, momentum in self.muon.momenta.items():
            momentum.copy_(tensors[f"muon.{shape[0]}x{shape[1]}"])
        for name, parameter in self.rest.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors]
            self.adam.state[parameter] = {
                key: tensors[f"adam.{key}.{name}"].to(parameter.device, copy=True) for key in keys
            }
        progress = json.loads((output / "state" / "progress.json").read_text())
        self.steps, self.runs = progress["steps"], progress["runs"]


def main() -> None:
    options = parsed_options()
    torch.set_float32_matmul_precision("high")
    options.output.mkdir(parents=True, exist_ok=True)
    warm_caches()  # before the workers fork, so that each inherits them
    training = Training(options.device, options.seed)
    if (options.output / "state" / "progress.json").exists():
        training.restore(options.output)
        print(f"goes on from step {training.steps}", flush=True)
    elif options.shrink_from:
        training.model.load_state_dict(shrunk(load_file(options.shrink_from / "model.safetensors"), training.model))
    if options.minutes:
        training.runs += 1
        train(training, options)
        training.save(options.output)
    if not options.skip_check:
        check(options)


def train(training: Training, options: argparse.Namespace) -> None:
    """Steps until the minutes are over, counted from the first step after compilation."""
    batches = Feed(options, seed=options.seed + training.runs)
    if options.compile:
        for layer in (*training.model.model.vision_model.encoder.layers, *training.model.model.text_model.layers):
            layer.compile(dynamic=False)
        started = time.monotonic()
        for batch in batches.one_of_each_length():
            training.step(batch, 0.0, 0.0)
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    training.model.train()
    started = logged = saved = time.monotonic()
    first, drawn, log = training.steps, batches.drawn, options.output / "log.jsonl"
    while (elapsed := time.monotonic() - started) < options.minutes * 60:
        rate = rate_at(elapsed / (options.minutes * 60))
        loss = training.step(next(batches), rate * options.muon_rate, rate * options.adam_rate)
        if training.steps % 100 == 0 or time.monotonic() - logged > 20:
            line = {"step": training.steps, "seconds": round(elapsed, 1), "loss": round(float(loss), 4)}
            line["rate"] = round(rate, 4)
            line["images_per_second"] = round((training.steps - first) * options.images / (elapsed + 1e-9))
            line["drawn_per_second"] = round((batches.drawn - drawn) * options.images / (elapsed + 1e-9))
            logged = time.monotonic()
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if training.steps % 500 == 0:
                print(line, flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            training.save(options.output)
            saved = time.monotonic()
    batches.close()
    print(f"{training.steps - first} steps, loss {float(loss):.4f}, {batches.drawn} batches drawn", flush=True)


class Feed(Iterator[Batch]):
    """Batches on the device, drawn by worker processes; an earlier one again while none is ready."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.rng = random.Random(seed)
        self.kept: list[Batch] = []
        self.drawn = 0
        self.ready: Queue[Batch] = Queue(maxsize=8)
        self.closed = False
        workers = options.workers
        data = DemoBatches(options.images, seed)
        loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None)
        threading.Thread(target=self._fill, args=(loader, options.device), daemon=True).start()

    def __next__(self) -> Batch:
        try:
            batch = self.ready.get(block=len(self.kept) < KEPT_BATCHES // 2)
        except Empty:
            return self.rng.choice(self.kept)
        self.drawn += 1
        self.kept.append(batch)
        if len(self.kept) > KEPT_BATCHES:
            self.kept.pop(0)
        return batch

    def one_of_each_length(self) -> list[Batch]:
        """A batch of every shape, for compiling."""
        seen: dict[int, Batch] = {}
        while len(seen) < len(LENGTHS):
            batch = next(self)
            seen[batch["ids"].shape[1]] = batch
        return list(seen.values())

    def close(self) -> None:
        """Lets the thread end; the workers end with it."""
        self.closed = True

    def _fill(self, loader: DataLoader[Batch], device: str) -> None:
        for batch in loader:
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            while not self.closed:
                try:
                    self.ready.put(on_device, timeout=1)
                    break
                except Full:  # look again whether the run is over
                    continue
            if self.closed:
                return


def rate_at(progress: float) -> float:
    """The learning rate's factor: up over 3 % of the run, level until 40 %, then straight down to zero."""
    if progress < 0.03:
        return progress / 0.03
    return min(1.0, max(0.0, (1 - progress) / 0.6))


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The weight matrices of linear layers, for Muon; all other parameters, for AdamW."""
    parameters = dict(model.named_parameters())
    inside = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices = {name: p for name, p in parameters.items() if name in inside and "lm_head" not in name}
    return matrices, {name: p for name, p in parameters.items() if name not in matrices}


def save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """Files of at most SHARD_BYTES (a single larger tensor would make a larger one)."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    for index, shard in enumerate(shards):
        part = folder / f"part-{index}.part"
        save_file(shard, part)
        part.replace(folder / f"part-{index}.safetensors")


def check(options: argparse.Namespace) -> None:
    """Writes report.json: the accuracy of the saved checkpoint in fp32, and with int8 linear layers simulated."""
    torch.set_float32_matmul_precision("highest")
    model = Idefics3ForConditionalGeneration.from_pretrained(options.output / "model", dtype=torch.float32)
    model.to(options.device)
    data = {
        "words": list(printed_words.test_samples(1000, 0))[: options.check_limit],
        "easy-vqa": list(easy_vqa.test_samples())[: options.check_limit],
    }
    report = {}
    for name, samples in data.items():
        score, wrong = accuracy(model, samples)
        with int8_linear_layers(model):
            int8_score, _ = accuracy(model, samples)
        report[name] = {"n": len(samples), "fp32": score, "int8": int8_score, "wrong": wrong[:60]}
        print(name, {k: v for k, v in report[name].items() if k != "wrong"}, wrong[:12], flush=True)
        (options.output / "report.json").write_text(json.dumps(report, indent=1))


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, without start and checks")
    parser.add_argument("--images", type=int, default=512, help="per step")
    parser.add_argument("--muon-rate", type=float, default=4e-3, help="of the weight matrices")
    parser.add_argument("--adam-rate", type=float, default=2e-3, help="of embeddings, norms and biases")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--shrink-from", type=Path, help="checkpoint folder of a model with a larger vision tower")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--check-limit", type=int, default=None, help="samples of each set")
    return parser.parse_args()


if __name__ == "__main__":
    main()
