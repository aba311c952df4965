"""What the towers' families share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.families.section import Section
from engine.spec import PixelNorm

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")


def read_norm(preprocessor: Mapping[str, Any], default: PixelNorm) -> PixelNorm:
    """From preprocessor_config.json; fields it leaves out take the family's default."""
    section = Section(preprocessor)
    mean = _channels(preprocessor, "image_mean", default.mean)
    std = _channels(preprocessor, "image_std", default.std)
    if not all(0 < number < math.inf for number in std):  # pixels are divided by them
        raise CheckpointError(f"preprocessor_config.json: image_std is {list(std)}; it must be three positive numbers")
    if not section.boolean("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    rescale = section.number("rescale_factor", default.rescale) if section.boolean("do_rescale", True) else 1.0
    return PixelNorm(mean=mean, std=std, rescale=rescale)


def _channels(preprocessor: Mapping[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value = preprocessor.get(name)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(number, int | float) for number in value):
        raise CheckpointError(f"preprocessor_config.json: {name} is {value!r}; it must be three numbers")
    return tuple(float(number) for number in value)
