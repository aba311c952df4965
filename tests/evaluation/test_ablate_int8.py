"""The ablation computes in transformers what the engine computes in int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.graphs.cuda.rounded import linear_names
from engine.runtime import Decoder
from evaluation.perplexity import Tokens, on_cpu, perplexity
from tests.runtime.conftest import Tiny, make_tiny
from tests.runtime.models import VOCAB
from tools.ablate_int8 import Model, ablation


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny("qwen2", tmp_path_factory)


@pytest.fixture
def pieces() -> list[Tokens]:
    return list(np.random.default_rng(1).integers(0, VOCAB - 10, (3, 90)))


def test_int8_everywhere_is_the_engines_int8(qwen2: Tiny, pieces: list[Tokens]) -> None:
    model = Model(Path(qwen2.checkpoint.folder))
    exact = model.perplexity("fp32", (), pieces)
    found = model.perplexity("int8", linear_names(qwen2.spec.decoder), pieces)
    wanted = perplexity(on_cpu(Decoder(qwen2.artifact("int8"), rows=1, context_length=90, threads=1)), pieces)
    off = np.abs(found.losses - wanted.losses).mean()
    assert off < 0.2 * np.abs(exact.losses - wanted.losses).mean()


def test_every_step_of_the_ablation_is_reported(qwen2: Tiny, pieces: list[Tokens]) -> None:
    spec = qwen2.spec.decoder
    found = ablation(Model(Path(qwen2.checkpoint.folder)), spec, pieces[0], pieces)
    table = found["perplexities"]
    assert table["fp32"]["ratio_to_fp16"] == pytest.approx(1, abs=1e-3)
    assert set(table) == {"fp32", "fp16", "W8A16", "W8A8 everywhere", "W8A8 by the rule"}
    rule = found["rule"]
    assert set(rule["float_inputs"]) <= set(rule["layers"]) <= set(linear_names(spec))
    assert rule["by_the_rule"] <= rule["budget"] or set(rule["float_inputs"]) == set(linear_names(spec))
    assert 0 <= rule["int8_share_of_multiplications"] <= 1
