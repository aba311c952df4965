"""Where an image's patches lie: their order, their positions, and the windows they attend in."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.spec import QwenVisionSpec

_ROTARY_BASE = 10000.0  # fixed in the reference implementation


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """What attends to itself: a still image, or a temporal patch of a video, whose patches attend to no other's.

    `pixels` are [frames, 3, height, width], of a still image one frame.
    """

    pixels: NDArray[np.uint8] = field(repr=False)
    height: int  # patches
    width: int

    @property
    def patches(self) -> int:
        return self.height * self.width

    @property
    def frames(self) -> int:
        return len(self.pixels)


def split_frames(pixels: NDArray[np.uint8], grid: tuple[int, int, int]) -> list[Picture]:
    """An image [3, height, width], or a video [frames, 3, height, width] of `grid`."""
    parts = np.split(pixels, grid[0]) if pixels.ndim == 4 else [pixels[None]]
    return [Picture(part, *grid[1:]) for part in parts]


def cut_patches(spec: QwenVisionSpec, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[frames, 3, height, width] to [patches, 3, frames, patch**2], in the order in which the merger joins them."""
    side, merge = spec.patch, spec.merge
    rows, columns = (length // (merge * side) for length in frames.shape[2:])
    blocks = frames.reshape(-1, 3, rows, merge, side, columns, merge, side)
    return blocks.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, 3, len(frames), side**2)


def vision_rotary(spec: QwenVisionSpec, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine [height * width, head_dim / 2] in the order of patches grouped by `merge`.

    Half of the angles turn with the row, half with the column (Qwen2VLVisionRotaryEmbedding).
    """
    quarter = spec.hidden // spec.heads // 2
    exponents = np.arange(0, quarter, 2, dtype=np.float32) / np.float32(quarter)
    inv_freq = np.float32(1.0) / np.power(np.float32(_ROTARY_BASE), exponents, dtype=np.float32)
    places = np.stack(_places(spec, height, width), axis=1).astype(np.float32)
    angles = (places[:, :, None] * inv_freq).reshape(height * width, -1).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def position_taps(spec: QwenVisionSpec, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows of the learned positions [4, patches] and their weights [4, patches, 1], in the order of patches.

    The square of `position_side` is stretched to the image, corner on corner, and read bilinearly, in fp32 as
    `get_vision_interpolation_indices_and_weights` of transformers 5.17, vision_utils.py, computes it.
    """
    axes = []
    for place, length in zip(_places(spec, height, width), (height, width), strict=True):
        source = place.astype(np.float32) * np.float32(spec.position_side - 1) / np.float32(max(length - 1, 1))
        floor = np.floor(source)
        taps = np.minimum(np.stack([floor, floor + 1]).astype(np.int64), spec.position_side - 1)
        axes.append((taps, np.stack([1 - (source - floor), 1 - np.abs(source - floor - 1)])))
    (rows, row_weights), (columns, column_weights) = axes
    taps = (rows[:, None] * spec.position_side + columns).reshape(4, -1)
    return taps, (row_weights[:, None] * column_weights).reshape(4, -1, 1).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class WindowLayout:
    """An image cut into windows, the last of a row or column as large as what is left.

    `order` int64 [patches] has the patches window by window, each in the order in which the merger joins them;
    `sizes` int64 [windows] says how many patches a window has; `tokens` int64 is `order` of merged patches.
    """

    order: NDArray[np.int64]
    sizes: NDArray[np.int64]
    tokens: NDArray[np.int64]


def window_layout(spec: QwenVisionSpec, height: int, width: int) -> WindowLayout:
    """As `get_vision_window_index` of transformers 5.17, vision_utils.py."""
    side, unit = spec.window // spec.merge, spec.merge**2
    rows, columns = np.indices((height // spec.merge, width // spec.merge)) // side
    windows = (rows * (columns.max() + 1) + columns).reshape(-1)
    tokens = np.argsort(windows, kind="stable")
    order = (tokens[:, None] * unit + np.arange(unit)).reshape(-1)
    return WindowLayout(order, np.bincount(windows) * unit, tokens)


def padded_windows(
    spec: QwenVisionSpec, height: int, width: int, images: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """TowerInputs.WINDOWS, WINDOW_MASK and UNWINDOWED of the CPU's graph, for images of one size."""
    layout, length = window_layout(spec, height, width), spec.window**2
    real = np.arange(length) < layout.sizes[:, None]
    windows = np.zeros(real.shape, np.int64)
    windows[real] = layout.order
    places = np.empty_like(layout.order)
    places[layout.order] = np.flatnonzero(real)
    number = np.arange(images)[:, None]
    mask = np.broadcast_to(real[None, :, None, None], (images, len(real), 1, length, length))
    return (
        (windows.reshape(-1) + number * height * width).reshape(-1, length),
        np.ascontiguousarray(mask).reshape(-1, 1, length, length),
        (places + number * real.size).reshape(-1),
    )


def _places(spec: QwenVisionSpec, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each patch [patches], in the order in which the merger joins them."""
    rows, columns = (
        axis.reshape(height // spec.merge, spec.merge, width // spec.merge, spec.merge).transpose(0, 2, 1, 3)
        for axis in np.indices((height, width))
    )
    return rows.reshape(-1), columns.reshape(-1)
