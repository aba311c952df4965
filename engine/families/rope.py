"""Rotary embedding parameters in their old and new spellings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.families.section import Section
from engine.spec import RopeSpec

_TYPES = ("default", "mrope", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class MRope:
    """A family's three-axis rotary embedding: the section that config.json may leave out, and how axes are mixed."""

    section: tuple[int, int, int]
    interleaved: bool = False


def read_rope(
    text: Section,
    head_dim: int,
    *,
    theta: float,
    context_length: int,
    mrope: MRope | None = None,
    partial: float = 1.0,
) -> RopeSpec:
    """Frequencies as `transformers.modeling_rope_utils` computes them.

    transformers 5 writes `rope_parameters`; before, `rope_theta` stood beside an optional `rope_scaling`. `theta` and
    `partial`, the share of a head that turns, are the family's defaults; a family whose heads turn as a whole has no
    other share. Raises CheckpointError for a scaling rule that is not supported.
    """
    rope = text.section("rope_parameters" if "rope_parameters" in text else "rope_scaling")
    kind = rope.choice("rope_type", rope.choice("type", "default", _TYPES), _TYPES)
    base = rope.number("rope_theta", text.number("rope_theta", theta))
    width = _width(rope, text, head_dim, partial)
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    inv_freq = np.float32(1.0) / np.power(np.float32(base), exponents, dtype=np.float32)
    if kind == "linear":
        inv_freq = inv_freq / np.float32(rope.number("factor", 1.0))
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, rope, context_length)
    return RopeSpec(
        inv_freq=tuple(float(value) for value in inv_freq),
        mrope_section=_mrope_section(rope, head_dim, width, mrope) if mrope else (),
        mrope_interleaved=mrope is not None and mrope.interleaved,
    )


def _width(rope: Section, text: Section, head_dim: int, partial: float) -> int:
    """Values of a head that turn."""
    if partial == 1.0:
        for section in (rope, text):
            if section.number("partial_rotary_factor", 1.0) != 1.0:
                raise section.fail("partial_rotary_factor", "1 (rotating part of a head is not supported)")
        return head_dim
    section = rope if "partial_rotary_factor" in rope else text
    width = int(head_dim * section.number("partial_rotary_factor", partial))
    if width % 2 or not 0 < width <= head_dim:
        raise section.fail("partial_rotary_factor", f"such that an even part of a head's {head_dim} values turns")
    return width


def _llama3(inv_freq: NDArray[np.float32], rope: Section, context_length: int) -> NDArray[np.float32]:
    """Llama 3.1's rule: low frequencies divided by `factor`, high ones kept, a ramp between."""
    factor = rope.number("factor", 8.0)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    original = rope.integer("original_max_position_embeddings", context_length)
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    ramp = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > original / low, inv_freq / factor, ramp)
    kept: NDArray[Any] = np.where(wavelength < original / high, inv_freq, scaled)
    return kept.astype(np.float32)


def _mrope_section(rope: Section, head_dim: int, width: int, mrope: MRope) -> tuple[int, ...]:
    if rope.boolean("mrope_interleaved", mrope.interleaved) != mrope.interleaved:
        raise rope.fail("mrope_interleaved", f"{str(mrope.interleaved).lower()} for this architecture")
    value = rope.get("mrope_section") or list(mrope.section)
    valid = isinstance(value, list) and len(value) == 3 and all(isinstance(pairs, int) for pairs in value)
    if not valid or sum(value) != width // 2:
        part = "head_dim" if width == head_dim else "the part of a head that turns"
        raise rope.fail("mrope_section", f"three integers that add up to half of {part}, {width // 2}")
    return tuple(value)
