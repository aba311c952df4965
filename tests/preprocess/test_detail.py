"""Low detail is fewer tokens where the processor has a choice, and never mixes with high."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.errors import CheckpointError
from engine.preprocess import DetailedProcessor, image_processor
from engine.preprocess.detail import LOW_PIXELS
from engine.request import Detail
from tests.preprocess.specs import qwen_spec, siglip_spec

LARGE = (1280, 960)
DETAILS: tuple[Detail, ...] = ("low", "high")


def with_settings(folder: Path, **settings: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def split(folder: Path, **settings: Any) -> DetailedProcessor:
    sizes = {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 128}}
    return image_processor(with_settings(folder, **(sizes | settings)), siglip_spec(128, patch=8, shuffle=2))


def picture(size: tuple[int, int] = LARGE) -> tuple[Image.Image, bytes]:
    file = io.BytesIO()
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.save(file, "PNG")
    return image, file.getvalue()


def test_low_detail_is_one_tile_of_many(tmp_path: Path) -> None:
    processor = split(tmp_path)
    assert processor.count(*LARGE) == (13 * 64, (1, 3, 4))
    assert processor.count(*LARGE, "low") == (64, (1, 0, 0))


def test_low_detail_is_at_most_512_by_512_pixels(tmp_path: Path) -> None:
    processor = image_processor(with_settings(tmp_path, min_pixels=56 * 56, max_pixels=28 * 28 * 1280), qwen_spec())
    (high, _), (low, (_, rows, columns)) = processor.count(*LARGE), processor.count(*LARGE, "low")
    assert rows * columns * 14 * 14 <= LOW_PIXELS
    assert 0.8 * LOW_PIXELS / 28**2 < low < high / 3


def test_a_small_image_has_one_detail_only(tmp_path: Path) -> None:
    processor = image_processor(with_settings(tmp_path, min_pixels=56 * 56, max_pixels=28 * 28 * 1280), qwen_spec())
    assert processor.count(200, 200, "low") == processor.count(200, 200)


@pytest.mark.parametrize("limits", [(1024 * 1024, 2048 * 2048), (100 * 100, 300 * 300)])
def test_low_detail_stays_within_the_processors_own_limits(tmp_path: Path, limits: tuple[int, int]) -> None:
    processor = image_processor(with_settings(tmp_path, min_pixels=limits[0], max_pixels=limits[1]), qwen_spec())
    tokens, _ = processor.count(*LARGE, "low")
    assert limits[0] * 0.9 <= tokens * 28**2 <= max(limits[0] * 1.1, min(limits[1], LOW_PIXELS))


def test_the_pixels_are_as_many_as_were_counted(tmp_path: Path) -> None:
    for processor in (split(tmp_path), image_processor(with_settings(tmp_path), qwen_spec())):
        for detail in DETAILS:
            made = processor.process(*picture(), detail)
            assert (made.tokens, made.grid) == processor.count(*LARGE, detail)


def test_the_details_have_keys_of_their_own(tmp_path: Path) -> None:
    for processor in (split(tmp_path), image_processor(with_settings(tmp_path), qwen_spec())):
        assert processor.key(b"a", "low") != processor.key(b"a", "high")
        assert processor.key(b"a") == processor.key(b"a", "high")
        assert processor.process(*picture(), "low").key == processor.key(picture()[1], "low")


def test_a_processor_without_a_choice_has_one_key(tmp_path: Path) -> None:
    processor = split(tmp_path, do_image_splitting=False)
    assert processor.key(b"a", "low") == processor.key(b"a", "high")


def test_malformed_settings_are_refused_as_ever(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="size"):
        image_processor(with_settings(tmp_path, min_pixels=900, max_pixels=100), qwen_spec())
