"""How well a demo model answers: greedy, in fp32 torch, and with int8 linear layers simulated."""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import batched

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import Idefics3ForConditionalGeneration

from evaluation.samples import Sample
from tools.demo_data import Conversation, collated, tile
from tools.demo_model import END

LONGEST_ANSWER = 16
"""Tokens generated at most; the longest answer of both data sets has 13."""


def image_features(model: Idefics3ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """[images * IMAGE_TOKENS, hidden] of uint8 pixels [images, TILE, TILE, 3], all of them real and unpadded."""
    vision = model.model.vision_model
    scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    hidden = vision.embeddings.patch_embedding(scaled).flatten(2).transpose(1, 2)
    hidden = hidden + vision.embeddings.position_embedding.weight
    for layer in vision.encoder.layers:
        hidden = layer(hidden, None)
    features: Tensor = model.model.connector(vision.post_layernorm(hidden))
    return features.flatten(0, 1)


def logits(model: Idefics3ForConditionalGeneration, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """[sequences, tokens, vocabulary] of right-padded sequences."""
    text = model.model.text_model
    embedded = text.embed_tokens(batch["ids"])
    rows = functional.pad(embedded.flatten(0, 1), (0, 0, 0, 1))  # the last row takes what is not used
    hidden = rows.index_put((batch["places"],), features.to(rows.dtype))[:-1].view_as(embedded)
    positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    rotation = text.rotary_emb(hidden, positions)
    for layer in text.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotation, position_ids=positions)
    scores: Tensor = model.lm_head(text.norm(hidden))
    return scores


@torch.no_grad()
def answers(model: Idefics3ForConditionalGeneration, samples: Iterable[Sample], size: int = 512) -> Iterator[str]:
    """The model's greedy answer to each sample, in order."""
    device = model.device
    model.train(False)
    for chunk in batched(samples, size):
        talks = [_prompt(sample) for sample in chunk]
        lengths = torch.tensor([len(talk.ids) for talk in talks], device=device)
        batch = collated(talks, int(lengths.max()) + LONGEST_ANSWER, len(talks))
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        features = image_features(model, batch["pixels"])
        rows = torch.arange(len(talks), device=device)
        ended = torch.zeros(len(talks), dtype=torch.bool, device=device)
        for step in range(LONGEST_ANSWER):
            token = logits(model, features, batch)[rows, lengths + step - 1].argmax(-1)
            batch["ids"][rows, lengths + step] = token
            ended |= token == END
            if ended.all():
                break
        for row, length in enumerate(lengths.tolist()):
            ids = batch["ids"][row, length : length + LONGEST_ANSWER].tolist()
            ids = ids[: ids.index(END)] if END in ids else ids
            yield bytes(token for token in ids if token < 256).decode(errors="replace")


def accuracy(model: Idefics3ForConditionalGeneration, samples: list[Sample]) -> tuple[float, list[tuple[str, str]]]:
    """The share of exact answers, and (wanted, got) of the wrong ones."""
    wrong = [(s.answer, got) for s, got in zip(samples, answers(model, samples), strict=True) if got != s.answer]
    return 1 - len(wrong) / len(samples), wrong


@contextmanager
def int8_linear_layers(model: nn.Module) -> Iterator[None]:
    """Rounds weights per output channel and inputs per token to 8 bits in every linear layer, while it lasts."""
    hooks, kept = [], []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            kept.append((module, module.weight.data))
            module.weight.data = rounded(module.weight.data)
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]), *inputs[1:])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, weight in kept:
            module.weight.data = weight


def rounded(values: Tensor) -> Tensor:
    """The nearest of 255 steps of each row's own scale (symmetric)."""
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (values / scale).round() * scale


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens that are learned (labels other than -100)."""
    return functional.cross_entropy(scores.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def _prompt(sample: Sample) -> Conversation:
    talk = Conversation()
    talk.turn(sample.question, "", tile=tile(Image.open(io.BytesIO(sample.image))))
    unanswered = len(talk.ids) - 2  # without the end and the newline that follow the (empty) answer
    talk.ids, talk.learned = talk.ids[:unanswered], talk.learned[:unanswered]
    return talk
