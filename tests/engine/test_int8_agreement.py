"""int8 gives the logits of fp32, from pixels to logits, on questions that the demo model never saw."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.checkpoints import Checkpoint, open_artifact
from engine.preprocess import decode_image, image_processor
from engine.prompts import PromptBuilder
from engine.prompts.positions import text_positions
from engine.request import Image, Message, Text
from engine.runtime import Decoder, Encoder
from engine.spec import Precision
from evaluation import easy_vqa, printed_words
from evaluation.samples import DataMissing, Sample

DEMO = Path(__file__).parents[2] / "demo"
Logits = NDArray[np.float32]


class Forced:
    """The demo model at one precision, led along right answers."""

    def __init__(self, precision: Precision, storage: Path) -> None:
        checkpoint = Checkpoint.open(DEMO)
        artifact = open_artifact(checkpoint, precision, storage)
        self._spec = artifact.spec
        self._images = image_processor(DEMO, self._spec)
        self._prompts = PromptBuilder(DEMO, self._spec)
        self._encoder = Encoder(artifact, threads=1)
        self._decoder = Decoder(artifact, rows=1, context_length=256, threads=1)

    def logits(self, sample: Sample) -> Logits:
        """[answer tokens + 1, vocab]: those that choose each token of the right answer, and those that end it."""
        pixels = self._images.process(decode_image(sample.image, max_megapixels=1), sample.image)
        prompt = self._prompts.build([Message("user", (Image(sample.image), Text(sample.question)))], [pixels])
        answer = self._prompts.tokenizer.encode(sample.answer)
        token_ids = np.concatenate([prompt.token_ids, answer])
        found = self._decoder.prefill(
            0,
            0,
            token_ids,
            text_positions(len(token_ids), self._spec.decoder.rope.axes),
            self._encoder.encode([pixels])[0],
            np.pad(prompt.feature_index, (0, len(answer)), constant_values=-1),
            logits="all",
        )
        return found[len(prompt.token_ids) - 1 :]


def cosine(left: Logits, right: Logits) -> NDArray[np.float32]:
    """Of each row with its counterpart."""
    similarity: NDArray[np.float32] = np.vecdot(left, right) / np.sqrt(np.vecdot(left, left) * np.vecdot(right, right))
    return similarity


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Logits, Logits]]:
    """fp32's and int8's logits of 250 questions about shapes and 150 about words."""
    try:
        samples = [*islice(easy_vqa.test_samples(), 0, None, 39), *printed_words.test_samples(150, seed=3)]
    except DataMissing as missing:
        pytest.skip(str(missing))
    storage = tmp_path_factory.mktemp("storage")
    full, small = Forced("fp32", storage), Forced("int8", storage)
    return [(full.logits(sample), small.logits(sample)) for sample in samples]


@pytest.mark.parametrize("steps", [slice(0, 1), slice(None)], ids=["first token", "along the right answer"])
def test_int8_agrees_with_fp32(pairs: list[tuple[Logits, Logits]], steps: slice) -> None:
    full = np.concatenate([left[steps] for left, _ in pairs])
    small = np.concatenate([right[steps] for _, right in pairs])
    assert len(full) >= len(pairs) >= 390
    assert cosine(full, small).mean() >= 0.999
    assert (full.argmax(axis=1) == small.argmax(axis=1)).mean() >= 0.99
