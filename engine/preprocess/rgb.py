"""Any of Pillow's colour modes to 8-bit RGB."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import InvalidImage


def to_rgb(image: Image.Image) -> Image.Image:
    """Transparency is composited on white; grey levels of more than 8 bits are scaled. Raises InvalidImage."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        return _on_white(image)
    if image.mode == "LAB":
        raise InvalidImage("the image has LAB colours, which are not supported; convert it to RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey converts to plain grey with alpha only
        image = image.convert("LA")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _to_8_bits(levels: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Integers by their bit depth, floats by [0, 1] or [0, 255]; values outside these by the range they have."""
    values = np.nan_to_num(levels.astype(np.float64))
    low, high = float(values.min()), float(values.max())
    if levels.dtype.kind == "u" and levels.dtype.itemsize == 2:
        low, high = 0.0, 65535.0
    elif low >= 0:
        steps = (255.0, 65535.0) if levels.dtype.kind in "iu" else (1.0, 255.0, 65535.0)
        low, high = 0.0, next((step for step in steps if high <= step), high)
    return np.round((values - low) * (255.0 / (high - low or 1.0))).astype(np.uint8)
