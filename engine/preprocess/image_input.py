"""An image, or a video, as the vision tower takes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from engine.errors import Cancelled

Grid = tuple[int, int, int]
IsWanted = Callable[[], bool]
"""Whether anybody still waits for a piece of work. Asked often, from any thread."""

_PIXELS_VERSION = 1  # raise it when this package makes other pixels of a file; features on disk are found by it


def always_wanted() -> bool:
    """By a caller that cannot go away."""
    return True


def require_wanted(is_wanted: IsWanted) -> None:
    """Raises Cancelled."""
    if not is_wanted():
        raise Cancelled("nobody waits for this request any more")


@dataclass(frozen=True, slots=True)
class Timing:
    """When the temporal patches of a video are, in seconds: each, and how far they are apart on average."""

    seconds: tuple[float, ...]
    interval: float


@dataclass(frozen=True, slots=True, eq=False)
class ImageInput:
    """Pixels neither rescaled nor normalised: the graph does both.

    | kind     | `pixels` (uint8)                           | `grid`                                           |
    |----------|--------------------------------------------|--------------------------------------------------|
    | smolvlm  | [tiles, 3, side, side]: row-major, global last | (1, rows, columns); rows = columns = 0 when unsplit |
    | gemma3   | [1, 3, side, side]                         | (1, 0, 0)                                        |
    | qwen2_vl | [3, height, width]                         | (1, patches down, patches across)                |
    | a video  | [frames, 3, height, width]                 | (temporal patches, patches down, patches across) |

    `tokens` is the number of placeholder tokens the image fills. `key` (32 bytes) names the file, processor settings
    and kind; two inputs of one key have the same pixels.
    """

    pixels: NDArray[np.uint8] = field(repr=False)
    grid: Grid
    tokens: int
    key: bytes
    timing: Timing | None = None  # of a video


class ImageProcessor(Protocol):
    """Thread-safe; one per model."""

    def process(self, image: Image.Image, data: bytes) -> ImageInput:
        """`image` is `data` decoded to RGB. Raises InvalidImage for a shape the model cannot take."""
        ...

    def count(self, width: int, height: int) -> tuple[int, Grid]:
        """Placeholder tokens and grid of an image of that size. Raises InvalidImage as `process` does."""
        ...

    def key(self, data: bytes) -> bytes:
        """`ImageInput.key` of an image file, without decoding it."""
        ...


def settings_digest(kind: str, settings: Mapping[str, Any]) -> bytes:
    """32 bytes that differ when anything differs that makes pixels of a file: settings, this code, Pillow."""
    made_by = f"{kind} {_PIXELS_VERSION} {PIL.__version__} {json.dumps(settings, sort_keys=True)}"
    return hashlib.sha256(made_by.encode()).digest()


def image_key(digest: bytes, data: bytes) -> bytes:
    """blake2b of the file, keyed with a processor's `settings_digest`."""
    return hashlib.blake2b(data, digest_size=32, key=digest).digest()
