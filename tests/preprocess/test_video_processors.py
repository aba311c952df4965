"""Frames, sizes, pixels and times of videos equal, bit by bit, those of transformers' video processors."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from engine.errors import CheckpointError, InvalidVideo
from engine.families.qwen2_vl import NORM
from engine.preprocess import QwenVideoProcessor, image_processor, video_processor
from engine.preprocess.qwen_video import torch_arange
from engine.preprocess.video_file import VideoFile, read_video
from engine.runtime.vision_layout import cut_patches, split_frames
from engine.spec import ModelSpec, PixelNorm, QwenVisionSpec
from tests.preprocess.films import film
from tests.preprocess.specs import qwen_spec, siglip_spec

MANY = 1 << 20  # tokens
SAMPLED: dict[str, Any] = {"do_sample_frames": True, "cap_pixels_per_frame": True}
RAW = {"do_rescale": False, "do_normalize": False}
# Frames, (width, height), frames in a second.
FILMS: list[tuple[int, tuple[int, int], float]] = [
    (40, (90, 64), 10),
    (4, (64, 64), 30),
    (31, (130, 220), 8),
    (150, (48, 32), 30),
    (61, (640, 360), 25),
    (9, (30, 26), 3),
    (17, (400, 24), 4),
]


def spec_of(kind: str, *, norm: PixelNorm | None = None) -> ModelSpec:
    spec = qwen_spec(patch=14 if kind == "qwen2_vl" else 16, image=1, video=2)
    assert isinstance(spec.vision, QwenVisionSpec)
    default = NORM if kind == "qwen2_vl" else PixelNorm()
    return replace(spec, vision=replace(spec.vision, norm=norm or default, timestamps=kind == "qwen3_vl"))


def ours(folder: Path, kind: str, *, max_tokens: int = MANY) -> QwenVideoProcessor:
    made = video_processor(folder, spec_of(kind), max_tokens=max_tokens)
    assert made is not None
    return made


def patches(spec: ModelSpec, pixels: NDArray[np.uint8], grid: tuple[int, int, int]) -> NDArray[np.uint8]:
    """[patches, 3 * frames * patch**2], as transformers has them."""
    assert isinstance(spec.vision, QwenVisionSpec)
    cut = [cut_patches(spec.vision, picture.pixels) for picture in split_frames(pixels, grid)]
    return np.concatenate(cut).reshape(sum(map(len, cut)), -1)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_vl", {}),
    ("qwen2_vl", {"fps": 3, "min_frames": 7, "max_frames": 20, "min_pixels": 28 * 28, "max_pixels": 112 * 112}),
    ("qwen2_vl", {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 40}, "max_video_tokens": 60}),
    ("qwen3_vl", {}),
    ("qwen3_vl", {"fps": 1, "min_frames": 5, "size": {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 90}}),
    ("qwen3_vl", {"max_video_tokens": 6, "max_frames": 9, "size": {"shortest_edge": 32, "longest_edge": 10**7}}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_pixels_are_those_of_transformers(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    reference: Any = (Qwen2VLVideoProcessor if kind == "qwen2_vl" else Qwen3VLVideoProcessor)(**SAMPLED, **settings)
    reference.save_pretrained(tmp_path)
    processor, spec, compared = ours(tmp_path, kind), spec_of(kind), 0
    for count, size, fps in FILMS:
        made = film(count, size, fps=fps, seed=count)
        metadata = VideoMetadata(total_num_frames=count, fps=made.fps)
        options = {"fps": settings.get("fps", 2.0)} if kind == "qwen2_vl" else {}
        if reference.sample_frames(metadata, **options)[-1] == count:  # transformers fails: one step too many
            continue
        wanted = reference(
            [torch.from_numpy(made.frames)], video_metadata=[metadata], return_metadata=True, **RAW, **options
        )
        video = read_video(made.file)
        found = processor.process(video)
        assert found.grid == tuple(wanted["video_grid_thw"][0].tolist()), size
        assert np.array_equal(patches(spec, found.pixels, found.grid), wanted["pixel_values_videos"].numpy()), size
        layout = processor.layout(video)
        assert (layout.grid, layout.tokens, layout.key) == (found.grid, found.tokens, found.key)
        assert found.tokens == math.prod(found.grid) // 4
        assert found.timing == layout.timing
        assert found.timing is not None
        assert len(found.timing.seconds) == found.grid[0]
        compared += 1
        assert found.timing.interval == 2 / wanted["video_metadata"][0].sampled_fps
    assert compared >= 5


def test_places_between_frames_are_torchs() -> None:
    """Some are so near to the next frame that rounding decides."""
    random = np.random.default_rng(0)
    cases = [(total, num) for total in range(2, 90) for num in range(2, total + 1, 2)]
    cases += [(int(total), 2 * int(random.integers(1, 385))) for total in random.integers(800, 50_000, 2000)]
    for total, num in cases:
        step = total / num
        assert np.array_equal(torch_arange(total, step), torch.arange(0, total, step).numpy()), (total, num)


def unread(frames: int, size: tuple[int, int], fps: float) -> VideoFile:
    return VideoFile(b"", "mov", *size, frames, fps, 0, ())


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_frames_and_sizes_of_long_videos_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    reference: Any = (Qwen2VLVideoProcessor if kind == "qwen2_vl" else Qwen3VLVideoProcessor)(**SAMPLED, fps=2)
    reference.save_pretrained(tmp_path)
    processor = ours(tmp_path, kind)
    random = np.random.default_rng(1)
    for _ in range(200):
        video = unread(int(random.integers(4, 40_000)), (640, 360), float(random.uniform(0.5, 61)))
        metadata = VideoMetadata(total_num_frames=video.frames, fps=video.fps)
        wanted = [index for index in reference.sample_frames(metadata).tolist() if index < video.frames]
        assert processor._frames(video) == wanted, video


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_a_video_fills_as_many_tokens_as_it_may_or_its_smallest_frames(kind: str, tmp_path: Path) -> None:
    size = {"shortest_edge": 64 * 64, "longest_edge": 10**8}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": size} | patch(kind)))
    for seconds in (5, 60, 600, 1800):
        for limit in (512, 8192):
            tokens = ours(tmp_path, kind, max_tokens=limit).layout(unread(30 * seconds, (1280, 720), 30)).tokens
            smallest = 768 / 2 * 5
            assert tokens <= max(limit, smallest)
            assert tokens > min(limit * 0.5, 10 * seconds)


def patch(kind: str) -> dict[str, int]:
    return {"patch_size": 14 if kind == "qwen2_vl" else 16}


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_a_video_of_one_frame_is_a_picture_that_lasts(kind: str, tmp_path: Path) -> None:
    processor = ours(tmp_path, kind)
    found = processor.process(read_video(film(1, (64, 64)).file))
    assert found.grid[0] == 1
    assert np.array_equal(found.pixels[0], found.pixels[1])


def test_what_is_far_longer_than_wide_is_refused(tmp_path: Path) -> None:
    for kind in ("qwen2_vl", "qwen3_vl"):
        with pytest.raises(InvalidVideo, match="200 times as long as wide"):
            ours(tmp_path, kind).layout(unread(10, (60, 16_000), 10))


def test_settings_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    def pixels() -> int:
        found = ours(tmp_path, "qwen2_vl")._largest
        reference: Any = AutoVideoProcessor.from_pretrained(tmp_path)  # type: ignore[no-untyped-call]
        assert reference.size["longest_edge"] == found
        return found

    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    write(tmp_path, "preprocessor_config.json", {"min_pixels": 784, "max_pixels": 7840, "size": {"max_pixels": 1}})
    assert pixels() == 7840
    write(tmp_path, "video_preprocessor_config.json", {"min_pixels": 784, "max_pixels": 78400})
    assert pixels() == 78400
    nested = {"video_processor_type": "Qwen2VLVideoProcessor", "size": {"shortest_edge": 784, "longest_edge": 1568}}
    write(tmp_path, "processor_config.json", {"video_processor": nested})
    assert pixels() == 1568


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"patch_size": 16}, "patch_size is 16, but config.json's vision tower has 14"),
        ({"temporal_patch_size": 4}, "temporal_patch_size is 4"),
        ({"fps": 0}, "fps is 0; it must be a positive number"),
        ({"min_pixels": 100, "max_pixels": 50}, "pixel counts in this order"),
        ({"resample": 1}, "resample is 1"),
        ({"image_mean": [0.1, 0.2, 0.3]}, "videos have another image_mean or image_std than images"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    write(tmp_path, "video_preprocessor_config.json", settings)
    with pytest.raises(CheckpointError, match=named):
        ours(tmp_path, "qwen2_vl")


def test_other_families_have_none(tmp_path: Path) -> None:
    assert video_processor(tmp_path, siglip_spec(32, patch=4, shuffle=2, image=1), max_tokens=9) is None


def test_a_key_names_the_file_the_settings_and_the_kind(tmp_path: Path) -> None:
    write(tmp_path, "preprocessor_config.json", {})
    video = replace(unread(40, (64, 64), 10), data=b"file")
    key = ours(tmp_path, "qwen2_vl").layout(video).key
    assert ours(tmp_path, "qwen2_vl").layout(video).key == key
    keys = {key, ours(tmp_path, "qwen2_vl").layout(replace(video, data=b"other")).key}
    keys.add(ours(tmp_path, "qwen2_vl", max_tokens=300).layout(video).key)
    keys.add(image_processor(tmp_path, spec_of("qwen2_vl")).key(b"file"))
    write(tmp_path, "video_preprocessor_config.json", {"fps": 1})
    keys.add(ours(tmp_path, "qwen2_vl").layout(video).key)
    write(tmp_path, "video_preprocessor_config.json", {"patch_size": 16})
    keys.add(ours(tmp_path, "qwen3_vl").layout(video).key)
    assert len(keys) == 6
