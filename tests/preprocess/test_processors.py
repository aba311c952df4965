"""Pixels equal, bit by bit, those of transformers' image processors before rescaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from engine.errors import CheckpointError, InvalidImage
from engine.preprocess import ImageInput, ImageProcessor, image_processor, read_settings
from engine.spec import QwenVisionSpec
from tests.preprocess.specs import gemma3_spec, qwen_spec, siglip_spec
from tests.runtime.cases import still_patches

RAW = {"do_rescale": False, "do_normalize": False}
SIZES = [
    (1, 1),
    (7, 5),
    (32, 32),
    (64, 64),
    (65, 64),
    (33, 200),
    (640, 480),
    (481, 641),
    (1300, 40),
    (3, 900),
    (97, 101),
]
QWEN_SIZES = [size for size in SIZES if max(size) <= 200 * min(size)] + [(200, 1), (28, 28), (27, 29), (1000, 998)]


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def saved(folder: Path, reference: Any) -> Path:
    reference.save_pretrained(folder)
    return folder


def patches(image: ImageInput, side: int, merge: int, temporal: int) -> NDArray[np.uint8]:
    """A still image cut as transformers cuts it: [patches, 3 * temporal * side * side]."""
    spec = qwen_spec(side, merge, temporal).vision
    assert isinstance(spec, QwenVisionSpec)
    return still_patches(spec, image.pixels).reshape(image.grid[1] * image.grid[2], -1)


def smolvlm(folder: Path, tile: int) -> ImageProcessor:
    return image_processor(folder, siglip_spec(tile, patch=4, shuffle=2))


@pytest.mark.parametrize("kind", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("longest", [32, 96, 120])
def test_smolvlm_tiles_are_those_of_transformers(kind: Any, splits: bool, longest: int, tmp_path: Path) -> None:
    reference = kind(size={"longest_edge": longest}, max_image_size={"longest_edge": 32}, do_image_splitting=splits)
    processor = smolvlm(saved(tmp_path, reference), 32)
    for size in SIZES:
        wanted = reference(picture(*size), return_row_col_info=True, return_tensors="np", **RAW)
        found = processor.process(picture(*size), b"file")
        assert found.pixels.dtype == np.uint8
        assert np.array_equal(found.pixels, wanted["pixel_values"][0]), size
        assert found.grid == (1, wanted["rows"][0][0], wanted["cols"][0][0])
        assert found.tokens == len(found.pixels) * 16
        assert processor.count(*size) == (found.tokens, found.grid)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 70, "width": 50}, "do_image_splitting": True},
        {"do_resize": False, "do_image_splitting": True},
        {"do_resize": False, "do_image_splitting": False, "resample": 3},
        {"size": {"longest_edge": 64}, "resample": 0},
    ],
)
def test_smolvlm_follows_every_setting(settings: dict[str, Any], tmp_path: Path) -> None:
    reference = Idefics3ImageProcessorPil(max_image_size={"longest_edge": 32}, **settings)
    processor = smolvlm(saved(tmp_path, reference), 32)
    for size in [(33, 65), (32, 20), (150, 90)]:
        wanted = reference(picture(*size), return_tensors="np", **RAW)["pixel_values"][0]
        assert np.array_equal(processor.process(picture(*size), b"").pixels, wanted)


def test_smolvlm_keeps_a_line_of_pixels(tmp_path: Path) -> None:
    reference = Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    found = smolvlm(saved(tmp_path, reference), 32).process(picture(5000, 1), b"")
    assert found.pixels.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("limits", [(65536, 16777216), (32 * 32, 64 * 64 * 30)])
def test_qwen3_patches_are_those_of_transformers(limits: tuple[int, int], tmp_path: Path) -> None:
    """As Qwen3-VL's checkpoints set Qwen2-VL's processor up."""
    size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    reference = Qwen2VLImageProcessorPil(size=size, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = image_processor(saved(tmp_path, reference), qwen_spec(patch=16))
    for shape in QWEN_SIZES:
        wanted = reference(picture(*shape), return_tensors="np", **RAW)
        found = processor.process(picture(*shape), b"file")
        assert np.array_equal(patches(found, 16, 2, 2), wanted["pixel_values"]), shape
        assert list(found.grid) == wanted["image_grid_thw"][0].tolist()
        assert processor.count(*shape) == (found.tokens, found.grid)


@pytest.mark.parametrize("limits", [(56 * 56, 28 * 28 * 1280), (100 * 100, 200 * 200), (28 * 28, 28 * 28 * 4)])
def test_qwen_patches_are_those_of_transformers(limits: tuple[int, int], tmp_path: Path) -> None:
    reference = Qwen2VLImageProcessorPil(min_pixels=limits[0], max_pixels=limits[1], size={})
    processor = image_processor(saved(tmp_path, reference), qwen_spec())
    for size in QWEN_SIZES:
        wanted = reference(picture(*size), return_tensors="np", **RAW)
        found = processor.process(picture(*size), b"file")
        assert found.pixels.dtype == np.uint8
        assert np.array_equal(patches(found, 14, 2, 2), wanted["pixel_values"]), size
        assert list(found.grid) == wanted["image_grid_thw"][0].tolist()
        assert found.tokens == found.grid[1] * found.grid[2] // 4
        assert processor.count(*size) == (found.tokens, found.grid)


def test_qwen_takes_other_patch_sizes(tmp_path: Path) -> None:
    options = {"patch_size": 4, "merge_size": 3, "temporal_patch_size": 1, "resample": 1}
    reference = Qwen2VLImageProcessorPil(size={"shortest_edge": 400, "longest_edge": 9000}, **options)
    processor = image_processor(saved(tmp_path, reference), qwen_spec(patch=4, merge=3, temporal=1))
    wanted = reference(picture(61, 130), return_tensors="np", **RAW)["pixel_values"]
    assert np.array_equal(patches(processor.process(picture(61, 130), b""), 4, 3, 1), wanted)


@pytest.mark.parametrize("settings", [{}, {"resample": 3}, {"do_pan_and_scan": True}])
def test_gemma_squares_are_those_of_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    reference = Gemma3ImageProcessorPil(size={"height": 64, "width": 64}, **settings)
    processor = image_processor(saved(tmp_path, reference), gemma3_spec(64, patch=8, shuffle=2))
    for size in SIZES:
        # The model's processor says False unless a caller asks, whatever the settings are.
        wanted = reference(picture(*size), return_tensors="np", do_pan_and_scan=False, **RAW)
        found = processor.process(picture(*size), b"file")
        assert found.pixels.dtype == np.uint8
        assert np.array_equal(found.pixels, wanted["pixel_values"]), size
        assert (found.tokens, found.grid) == processor.count(*size) == (16, (1, 0, 0))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size": {"height": 32, "width": 64}}, "size is 32 x 64 pixels, but config.json's vision tower takes 64 x 64"),
        ({"size": {"longest_edge": 64}}, "size is 0 x 0 pixels"),
        ({"size": {"height": 64, "width": 64}, "do_resize": False}, "do_resize is False"),
    ],
)
def test_gemma_settings_that_do_not_fit_are_named(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", settings)
    with pytest.raises(CheckpointError, match=named):
        image_processor(tmp_path, gemma3_spec(64, patch=8, shuffle=2))


def test_qwen_refuses_what_is_far_longer_than_wide(tmp_path: Path) -> None:
    processor = image_processor(saved(tmp_path, Qwen2VLImageProcessorPil()), qwen_spec())
    for call in (lambda: processor.count(1, 201), lambda: processor.process(picture(201, 1), b"")):
        with pytest.raises(InvalidImage, match="200 times as long as wide"):
            call()


def test_min_and_max_pixels_win_over_size(tmp_path: Path) -> None:
    write(
        tmp_path, "preprocessor_config.json", {"min_pixels": 784, "max_pixels": 3136, "size": {"shortest_edge": 10**6}}
    )
    assert image_processor(tmp_path, qwen_spec()).count(1000, 1000) == (4, (1, 4, 4))


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_the_nested_layout_wins_over_the_flat_one(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {"max_image_size": {"longest_edge": 32}, "size": {"longest_edge": 32}})
    write(tmp_path, "processor_config.json", {"image_seq_len": 16})
    assert smolvlm(tmp_path, 32).count(64, 64) == (16, (1, 0, 0))
    nested = {"max_image_size": {"longest_edge": 32}, "size": {"longest_edge": 64}}
    write(tmp_path, "processor_config.json", {"image_processor": nested})
    assert smolvlm(tmp_path, 32).count(64, 64) == (80, (1, 2, 2))
    assert read_settings(tmp_path).values == nested


def test_missing_or_malformed_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        smolvlm(tmp_path, 32)
    for text in ("{", "[]", ""):
        write(tmp_path, "preprocessor_config.json", text)
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
            smolvlm(tmp_path, 32)
    (tmp_path / "preprocessor_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        smolvlm(tmp_path, 32)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_image_size": 32}, "max_image_size is 32; it must be an object"),
        ({"max_image_size": {"longest_edge": "32"}}, "longest_edge is '32'"),
        ({"max_image_size": {"longest_edge": 64}}, "takes tiles of 32"),
        ({"max_image_size": {"longest_edge": 32}, "size": {"height": 3}}, "longest_edge, or with height and width"),
        ({"max_image_size": {"longest_edge": 32}, "do_image_splitting": "yes"}, "do_image_splitting is 'yes'"),
        ({"max_image_size": {"longest_edge": 32}, "resample": 9}, "resample is 9"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", settings)
    with pytest.raises(CheckpointError, match=named):
        smolvlm(tmp_path, 32)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"patch_size": 16}, "patch_size is 16, but config.json's vision tower has 14"),
        ({"merge_size": 4}, "merge_size is 4"),
        ({"do_resize": False}, "do_resize is False"),
        ({"min_pixels": 100, "max_pixels": 50}, "smallest and largest pixel count"),
        ({"size": {"longest_edge": 9}}, "smallest and largest pixel count"),
    ],
)
def test_qwen_settings_that_do_not_fit_are_named(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", settings)
    with pytest.raises(CheckpointError, match=named):
        image_processor(tmp_path, qwen_spec())


def test_a_key_names_the_file_the_settings_and_the_kind(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {"max_image_size": {"longest_edge": 32}})
    first = smolvlm(tmp_path, 32)
    assert first.key(b"a") == first.process(picture(3, 3), b"a").key == smolvlm(tmp_path, 32).key(b"a")
    assert len(first.key(b"")) == 32
    keys = {first.key(b"a"), first.key(b"b")}
    write(tmp_path, "preprocessor_config.json", {"max_image_size": {"longest_edge": 32}, "resample": 0})
    keys.add(smolvlm(tmp_path, 32).key(b"a"))
    write(tmp_path, "preprocessor_config.json", {})
    keys.add(image_processor(tmp_path, qwen_spec()).key(b"a"))
    assert len(keys) == 4
