"""Perplexity through the engine's decoders is the reference's."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from cli import evaluate
from engine.graphs.cuda import cuda_decoder
from engine.runtime import Decoder
from engine.runtime.cuda.decoder import PagedDecoder
from engine.runtime.cuda.weights import DeviceWeights
from evaluation import perplexity as measured
from evaluation.perplexity import Perplexity, Tokens, negative_log_likelihood, on_cpu, on_cuda, perplexity, windows
from tests.cuda.reference import ReferenceSession
from tests.runtime.conftest import Tiny, make_tiny
from tests.runtime.models import VOCAB


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny("llama", tmp_path_factory)


@pytest.fixture
def pieces() -> list[Tokens]:
    return list(np.random.default_rng(1).integers(0, VOCAB - 10, (3, 90)))


def reference(tiny: Tiny, pieces: list[Tokens]) -> float:
    """transformers' own loss."""
    ids = torch.from_numpy(np.stack(pieces))
    with torch.no_grad():
        return math.exp(float(tiny.reference(ids, labels=ids).loss))


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "CHUNK", 32)


def test_on_the_cpu_it_is_what_transformers_says(llama: Tiny, pieces: list[Tokens]) -> None:
    found = perplexity(on_cpu(Decoder(llama.artifact("fp32"), rows=1, context_length=90, threads=1)), pieces)
    assert found.losses.shape == (3, 89)
    assert found.value == pytest.approx(reference(llama, pieces), rel=1e-4)


def test_on_a_device_it_is_what_transformers_says(llama: Tiny, pieces: list[Tokens]) -> None:
    artifact = llama.artifact("fp16")
    graph = cuda_decoder(artifact, "float16", 90)
    decoder = PagedDecoder(
        ReferenceSession(graph.model, DeviceWeights(artifact, torch.device("cpu")).upload(graph.weights)),
        artifact.spec.decoder,
        torch.zeros(33, dtype=torch.int32),
        dtype=torch.float16,
        blocks=7,
        block_size=16,
        slots=32,
        context_length=90,
        step_tokens=32,
    )
    assert perplexity(on_cuda(decoder, 16, 32), pieces).value == pytest.approx(reference(llama, pieces), rel=1e-2)


def test_a_guess_among_all_tokens_has_the_vocabularys_size_as_perplexity() -> None:
    def flat(tokens: Tokens) -> Iterator[NDArray[np.float32]]:
        yield np.full((len(tokens), 50), 1e4, np.float32)

    assert perplexity(flat, [np.arange(10), np.arange(5, 15)]).value == pytest.approx(50)


def test_a_certain_and_an_impossible_token_have_finite_losses() -> None:
    logits = np.array([[0, 1000], [0, 1000]], np.float32)
    assert negative_log_likelihood(logits, np.array([1, 0])).tolist() == [0, 1000]


def test_the_ratio_is_that_of_the_perplexities_and_its_interval_that_of_the_windows() -> None:
    losses = np.random.default_rng(0).uniform(1, 4, (8, 100))
    low, high = Perplexity(losses), Perplexity(losses + np.log(1.02))
    assert high.ratio_to(low) == pytest.approx((1.02, 0))
    assert high.value / low.value == pytest.approx(1.02)
    assert (low.ratio_to(Perplexity(losses[:, ::-1].copy()))[1] or 0) < 1e-9
    assert (low.ratio_to(Perplexity(losses[::-1]))[1] or 0) > 0.01
    assert Perplexity(losses[:1]).ratio_to(Perplexity(losses[:1])) == (1.0, None)


def test_windows_are_spread_over_the_text_and_do_not_overlap() -> None:
    found = windows(np.arange(1000), 90, 4)
    assert [int(piece[0]) for piece in found] == [0, 270, 540, 900]
    assert {len(piece) for piece in found} == {90}
    assert len(windows(np.arange(1000), 400, 100)) == 2


def test_the_text_is_long_and_english() -> None:
    text = measured.text()
    assert len(text) > 400_000
    assert text.count(" the ") > 3_000


def test_the_command_compares_two_precisions(
    llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "tiny"
    folder.parent.mkdir()
    folder.symlink_to(llama.checkpoint.folder)
    words = {f"w{number}": number for number in range(VOCAB - 1)} | {"[UNK]": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    text = " ".join(f"w{number}" for number in np.random.default_rng(2).integers(0, VOCAB - 1, 400))
    monkeypatch.setattr("cli.perplexity.text", lambda: text)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    command = "perplexity --model tiny --device cpu --precision int8 --against fp32 --tokens 256 --window 64 --json"
    assert evaluate.run(parser.parse_args([*command.split(), "--storage", str(tmp_path)])) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["precision"], said["against"], said["windows"], said["window"]) == ("int8", "fp32", 4, 64)
    assert said["ratio"] == pytest.approx(1, abs=0.05)
    assert said["ratio"] == pytest.approx(said["perplexity"] / said["against_perplexity"])


def test_a_window_beyond_the_models_context_is_refused(
    llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models" / "tiny"
    folder.parent.mkdir()
    folder.symlink_to(llama.checkpoint.folder)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    command = "perplexity --model tiny --device cpu --window 4096"
    assert evaluate.run(parser.parse_args([*command.split(), "--storage", str(tmp_path)])) == 1
    assert "give 2 to 256" in capsys.readouterr().err
