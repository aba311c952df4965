"""The easy-vqa data set: 5,000 drawn shapes of 64 x 64 pixels and 48,248 questions about them, split by its author.

Source: the package easy-vqa 1.0 (https://github.com/vzhou842/easy-VQA, MIT). Its train and test folders hold different
images; nothing is moved between them here.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from evaluation.samples import Sample, package_folder

Split = Literal["train", "test"]


def test_samples() -> Iterator[Sample]:
    """All 9,673 questions of the test split, in the package's order."""
    return samples("test")


def samples(split: Split) -> Iterator[Sample]:
    """Every question of one split. Questions about one image share its bytes."""
    for question, answer, image_id in questions(split):
        yield Sample(image=image_file(split, image_id), question=question, answer=answer)


@cache
def questions(split: Split) -> tuple[tuple[str, str, int], ...]:
    """(question, answer, image id) of one split; ids count from 0 in each split."""
    rows = json.loads((_folder(split) / "questions.json").read_text(encoding="utf-8"))
    return tuple((question, answer, image_id) for question, answer, image_id in rows)


@cache
def image_file(split: Split, image_id: int) -> bytes:
    """The PNG file of one image."""
    return (_folder(split) / "images" / f"{image_id}.png").read_bytes()


def _folder(split: Split) -> Path:
    return package_folder("easy_vqa", "easy-vqa==1.0") / "data" / split
