"""The Qwen families' video processors: which frames are taken, how large they are, and when they were.

The arithmetic is that of transformers 5.17, models/qwen2_vl/video_processing_qwen2_vl.py (Qwen2-VL, Qwen2.5-VL) and
models/qwen3_vl/video_processing_qwen3_vl.py (Qwen3-VL, Qwen3.5), with do_sample_frames and cap_pixels_per_frame, as the
models were trained. Both limit a video's pixels, so that a longer one has smaller frames.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import CheckpointError, InvalidVideo
from engine.families.qwen2_vl import NORM as CLIP_NORM
from engine.families.vision import read_norm
from engine.preprocess.image_input import ImageInput, IsWanted, Timing, always_wanted, image_key, settings_digest
from engine.preprocess.qwen2_vl import require_equal
from engine.preprocess.resize import resize_bicubic
from engine.preprocess.settings import Settings
from engine.spec import PixelNorm, QwenVisionSpec

if TYPE_CHECKING:
    from engine.preprocess.video_file import VideoFile

_MAX_RATIO = 200
_MARGIN = 1.05  # of the smallest frames, however many there are
_NO_PIXELS = np.empty((0,), np.uint8)


class QwenVideoProcessor(ABC):
    """Thread-safe. Raises CheckpointError for settings that do not fit the tower."""

    # Where settings say nothing:
    _patch_size, _min_pixels, _max_pixels = 14, 0, 0
    _norm = PixelNorm()

    def __init__(self, settings: Settings, spec: QwenVisionSpec, *, max_tokens: int) -> None:
        """`max_tokens` bounds what one video fills of a prompt, beside the checkpoint's own limits."""
        self._patch, self._temporal = spec.patch, spec.temporal_patch
        self._factor = spec.patch * spec.merge
        require_equal(settings, "patch_size", self._patch_size, spec.patch)
        require_equal(settings, "merge_size", 2, spec.merge)
        require_equal(settings, "temporal_patch_size", 2, spec.temporal_patch)
        if settings.resample(Image.Resampling.BICUBIC) != Image.Resampling.BICUBIC:
            raise settings.fail("resample", "3 (bicubic) for videos")
        _require_norm(settings, spec.norm, self._norm)
        self._fps = settings.number("fps", 2.0)
        self._min_frames = settings.integer("min_frames", 4)
        self._max_frames = settings.integer("max_frames", 768)
        self._smallest, self._largest = self._pixel_range(settings)
        self._budget = self._pixel_budget(settings, max_tokens)

    def layout(self, video: VideoFile) -> ImageInput:
        """What the video will be to the prompt; no frame is decoded for it. Raises InvalidVideo for its shape."""
        indices = self._frames(video)
        height, width = self._size(len(indices), video)
        indices = _padded(indices, self._temporal)
        grid = (len(indices) // self._temporal, height // self._patch, width // self._patch)
        tokens = grid[0] * (height // self._factor) * (width // self._factor)
        return ImageInput(_NO_PIXELS, grid, tokens, image_key(self._digest, video.data), self._timing(video, indices))

    def process(self, video: VideoFile, is_wanted: IsWanted = always_wanted) -> ImageInput:
        """Decode the frames, each made as large as it will be before the next. Raises InvalidVideo and Cancelled."""
        from engine.preprocess.video_file import video_frames  # FFmpeg, which an engine without videos has no need of

        layout = self.layout(video)
        indices = self._frames(video)
        height, width = layout.grid[1] * self._patch, layout.grid[2] * self._patch
        pixels = np.empty((layout.grid[0] * self._temporal, 3, height, width), np.uint8)
        for place, frame in enumerate(video_frames(video, indices, is_wanted)):
            pixels[place] = resize_bicubic(frame.transpose(2, 0, 1), height, width)
        pixels[len(indices) :] = pixels[len(indices) - 1]
        return replace(layout, pixels=pixels)

    @functools.cached_property
    def _digest(self) -> bytes:
        import av  # here for the reason above

        return settings_digest(type(self).__name__, {
            "av": av.__version__, "patch": self._patch, "factor": self._factor,
            "temporal": self._temporal, "fps": self._fps, "frames": [self._min_frames, self._max_frames],
            "pixels": [self._smallest, self._largest, *self._budget],
        })  # fmt: skip

    def _pixel_range(self, settings: Settings) -> tuple[int, int]:
        default = {"shortest_edge": self._min_pixels, "longest_edge": self._max_pixels}
        size = settings.section("size", default)
        smallest, largest = size.integer("shortest_edge", 0), size.integer("longest_edge", 0)
        return self._checked(settings, smallest, largest)

    def _checked(self, settings: Settings, smallest: int, largest: int) -> tuple[int, int]:
        if not 0 < smallest <= largest:
            raise settings.fail("size", "an object with shortest_edge and longest_edge, pixel counts in this order")
        return smallest, largest

    def _timing(self, video: VideoFile, indices: Sequence[int]) -> Timing:
        """As `Qwen3VLProcessor._calculate_timestamps` and `VideoMetadata.sampled_fps` have it."""
        seconds = [index / video.fps for index in indices]
        groups = range(0, len(seconds), self._temporal)
        middles = tuple((seconds[first] + seconds[first + self._temporal - 1]) / 2 for first in groups)
        sampled_fps = len(self._frames(video)) / video.frames * video.fps
        return Timing(middles, self._temporal / sampled_fps)

    @abstractmethod
    def _pixel_budget(self, settings: Settings, max_tokens: int) -> tuple[int, int]:
        """Of all frames together, and of one."""
        ...

    @abstractmethod
    def _frames(self, video: VideoFile) -> list[int]:
        """Indices of the frames that are taken."""
        ...

    @abstractmethod
    def _size(self, frames: int, video: VideoFile) -> tuple[int, int]:
        """Height and width that all frames are resized to."""
        ...

    def _fitted(self, height: int, width: int, frames: int, pixels: int, largest: int) -> tuple[int, int]:
        """Both sides multiples of the factor; `pixels` is their area by `frames`, within limits."""
        if max(height, width) > _MAX_RATIO * min(height, width):
            raise InvalidVideo(
                f"the video is {width}x{height} pixels; this model takes videos up to {_MAX_RATIO} times as long as"
                " wide: crop it"
            )
        factor = self._factor
        rows, columns = round(height / factor), round(width / factor)
        if pixels * rows * columns * factor**2 > largest:
            scale = math.sqrt(frames * height * width / largest)
            rows = max(1, math.floor(height / scale / factor))
            columns = max(1, math.floor(width / scale / factor))
        elif pixels * rows * columns * factor**2 < self._smallest:
            scale = math.sqrt(self._smallest / (frames * height * width))
            rows, columns = math.ceil(height * scale / factor), math.ceil(width * scale / factor)
        return rows * factor, columns * factor


class Qwen2VLVideoProcessor(QwenVideoProcessor):
    """Limits hold for a frame; what a context holds, for all of them."""

    _min_pixels, _max_pixels = 128 * 28 * 28, 768 * 28 * 28
    _norm = CLIP_NORM

    def _pixel_range(self, settings: Settings) -> tuple[int, int]:
        """min_pixels and max_pixels, each for itself, win over `size`."""
        default = {"shortest_edge": self._min_pixels, "longest_edge": self._max_pixels}
        size = settings.section("size", default)
        smallest = settings.integer("min_pixels", size.integer("shortest_edge", 0))
        largest = settings.integer("max_pixels", size.integer("longest_edge", 0))
        return self._checked(settings, smallest, largest)

    def _pixel_budget(self, settings: Settings, max_tokens: int) -> tuple[int, int]:
        tokens = min(settings.integer("max_video_tokens", 128_000), max_tokens)
        return int(tokens * self._factor * self._factor * 0.9), self._largest

    def _frames(self, video: VideoFile) -> list[int]:
        most = min(self._max_frames, video.frames) // self._temporal * self._temporal
        wanted = min(max(video.frames / video.fps * self._fps, self._min_frames), most, video.frames)
        count = math.floor(wanted / self._temporal) * self._temporal
        if count == 0:
            return [0]  # a single frame, which the original has no rule for
        return [int(place) for place in torch_arange(video.frames, video.frames / count)[:count]]

    def _size(self, frames: int, video: VideoFile) -> tuple[int, int]:
        together, most = self._budget
        share = max(min(most, together * self._temporal // frames), int(self._smallest * _MARGIN))
        return self._fitted(video.height, video.width, 1, 1, share)


class Qwen3VLVideoProcessor(QwenVideoProcessor):
    """Limits hold for all frames together."""

    _patch_size, _min_pixels, _max_pixels = 16, 128 * 32 * 32, 768 * 32 * 32

    def _pixel_budget(self, settings: Settings, max_tokens: int) -> tuple[int, int]:
        together = max(self._smallest, min(self._largest, max_tokens * self._temporal * self._factor**2))
        return together, settings.integer("max_video_tokens", 768) * self._factor**2

    def _frames(self, video: VideoFile) -> list[int]:
        wanted = int(video.frames / video.fps * self._fps)
        count = min(max(wanted, self._min_frames), self._max_frames, video.frames)
        return [int(index) for index in np.linspace(0, video.frames - 1, count).round()]

    def _size(self, frames: int, video: VideoFile) -> tuple[int, int]:
        frames = max(frames, self._temporal)  # a single frame, which the original has no rule for
        together, most = self._budget
        share = max(min(most, together // frames), int(self._smallest * _MARGIN))
        height, width = video.height, video.width
        if height < self._factor or width < self._factor:
            scale = max(self._factor / height, self._factor / width)
            height, width = int(height * scale), int(width * scale)
        even = round(frames / self._temporal) * self._temporal
        return self._fitted(height, width, frames, even, share * frames)


def _require_norm(settings: Settings, expected: PixelNorm, default: PixelNorm) -> None:
    """The tower's graph has one, for images and videos."""
    if read_norm(settings.values, default) != expected:
        raise CheckpointError(
            f"{settings.file}: videos have another image_mean or image_std than images, {list(expected.mean)} and"
            f" {list(expected.std)}; make the two agree"
        )


def torch_arange(stop: int, step: float) -> NDArray[np.float32]:
    """torch.arange(0, stop, step) in float32, which decides what frame a place at the border of two is.

    Steps are counted in float64 from every eighth value, which is rounded; what sixteens leave over, from the first.
    """
    places = np.arange(math.ceil(stop / step))
    values = (places // 8 * 8 * step).astype(np.float32) + places % 8 * step
    rest = len(places) // 16 * 16
    values[rest:] = places[rest:] * step
    return values.astype(np.float32)


def _padded(indices: list[int], multiple: int) -> list[int]:
    """The last one again until they are a multiple."""
    return indices + indices[-1:] * (-len(indices) % multiple)
