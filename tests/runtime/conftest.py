"""A tiny model of each family with its artifacts, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import PreTrainedModel

from engine.checkpoints import Artifact, Checkpoint, open_artifact
from engine.runtime import Decoder, Encoder
from engine.spec import ModelSpec, Precision
from tests.runtime import models
from tests.runtime.cases import Case, logits_at, make_case, pictures

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "smolvlm": models.smolvlm,
    "idefics3": models.idefics3,
    "qwen2_vl": models.qwen2_vl,
    "qwen2_5_vl": models.qwen2_5_vl,
    "llama": lambda: models.llama(head_dim=32, num_key_value_heads=1, mlp_bias=True, attention_bias=True),
    "qwen2": lambda: models.qwen2(num_key_value_heads=4, tie_word_embeddings=True),
    "qwen3": models.qwen3,
    "qwen3_vl": models.qwen3_vl,
    "gemma3": models.gemma3,
    "gemma3_text": models.gemma3_text,
    "qwen3_5": models.qwen3_5,
    "qwen3_5_text": lambda: models.qwen3_5_text(linear_num_value_heads=2, tie_word_embeddings=True),
}
# Split and unsplit tiles; grids of several sizes, two of them alike.
SHAPES: dict[str, list[tuple[int, int]]] = {
    "smolvlm": [(0, 0), (1, 2), (0, 0)],
    "idefics3": [(2, 2), (0, 0)],
    "qwen2_vl": [(4, 6), (2, 2), (4, 6), (8, 2)],
    "qwen2_5_vl": [(8, 14), (2, 2), (12, 6)],
    "llama": [],
    "qwen2": [],
    "qwen3": [],
    "qwen3_vl": [(6, 10), (2, 2), (4, 6), (2, 12)],
    "gemma3": [(0, 0), (0, 0)],
    "gemma3_text": [],
    "qwen3_5": [(6, 10), (2, 2), (4, 6), (2, 12)],
    "qwen3_5_text": [],
}
ROWS, CONTEXT, PROMPT, STEPS = 6, 160, 113, 32


@dataclass(eq=False)
class Tiny:
    """One model: the reference, and ours in both precisions."""

    reference: PreTrainedModel
    checkpoint: Checkpoint
    storage: Path
    shapes: list[tuple[int, int]]

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    def artifact(self, precision: Precision) -> Artifact:
        return open_artifact(self.checkpoint, precision, self.storage)

    def decoder(self, precision: Precision) -> Decoder:
        return Decoder(self.artifact(precision), rows=ROWS, context_length=CONTEXT, threads=2)

    def encoder(self, precision: Precision) -> Encoder:
        return Encoder(self.artifact(precision), threads=2)

    @cached_property
    def case(self) -> Case:
        """PROMPT + STEPS tokens, with the family's images."""
        images = pictures(self.spec, self.shapes, seed=1)
        return make_case(self.reference, self.spec, images, PROMPT + STEPS, seed=2)

    def text_case(self, length: int, seed: int) -> Case:
        return make_case(self.reference, self.spec, [], length, seed)

    def case_anywhere(self, length: int, seed: int) -> Case:
        """Text at positions that differ from axis to axis."""
        case = self.text_case(length, seed)
        positions = np.random.default_rng(seed).integers(0, CONTEXT, (self.spec.decoder.rope.axes, length))
        return replace(case, positions=positions, logits=logits_at(self.reference, case.token_ids, positions))

    def features(self, precision: Precision) -> NDArray[np.float32]:
        """What our own encoder makes of the case's images."""
        if not self.case.pictures:
            return self.case.features
        return np.concatenate(self.encoder(precision).encode(self.case.pictures))


@pytest.fixture(scope="session", params=list(MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=["smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3"])
def tiny_vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_text"])
def tiny_mrope(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Three rotary positions per token."""
    return make_tiny(request.param, tmp_path_factory)


_MADE: dict[str, Tiny] = {}


def make_tiny(name: str, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    if name not in _MADE:
        reference = models.randomise(MODELS[name](), seed=len(_MADE))
        folder = models.save(reference, tmp_path_factory.mktemp(name))
        _MADE[name] = Tiny(reference, Checkpoint.open(folder), tmp_path_factory.mktemp("storage"), SHAPES[name])
    return _MADE[name]
