"""Which fonts a case-sensitive word may be printed in.

Source: the 100 Latin TrueType files of the package trdg 1.8.0. A font is left out when its glyphs do not tell all
letters apart (I and l alike, capitals in place of small letters, small capitals), or when its strokes fade at the
smallest size printed.
"""

import string
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from evaluation.samples import package_folder

LETTERS = string.ascii_letters
RULE_SIZE = 48
"""Type size, in pixels per em, at which the rule compares glyphs."""
LEAST_DIFFERENCE = 0.085
"""Two letters must differ in this share of their ink. The O and Q of most fonts differ in 0.1."""
MOST_SMALL_CAPITALS = 13
"""A font with more letters than this whose two cases have one shape is a font of small capitals. Ordinary fonts have
about ten (c, o, s, v, w, x, z and some of i, j, k, p, u, y)."""
SMALL_CAPITAL_DIFFERENCE = 0.35
"""Two cases whose glyphs, scaled to one box, differ in less than this share of their ink have one shape."""
LEAST_INK = 0.75
"""At the smallest size the darkest pixels of a stroke must reach this share of full ink."""
SMALLEST_LINE = 16

Glyph = NDArray[np.float32]


@cache
def usable_fonts() -> tuple[Path, ...]:
    """The fonts that pass the rule, sorted by file name."""
    return tuple(font for font in all_fonts() if tells_letters_apart(font) and stays_dark(font))


@cache
def all_fonts() -> tuple[Path, ...]:
    """Every Latin font of the package."""
    folder = package_folder("trdg", "--no-deps trdg==1.8.0") / "fonts" / "latin"
    return tuple(sorted(folder.glob("*.ttf")))


def tells_letters_apart(font: Path) -> bool:
    """Whether every two of the 52 letters look different, and small letters are not just smaller capitals."""
    glyphs = [_glyph(font, letter) for letter in LETTERS]
    return least_difference(glyphs) >= LEAST_DIFFERENCE and small_capitals(glyphs) <= MOST_SMALL_CAPITALS


def stays_dark(font: Path) -> bool:
    """Whether strokes stay visible at the smallest size."""
    face = face_for_line(font, SMALLEST_LINE)
    peaks = [np.asarray(_drawn(face, letter)).max() / 255 for letter in LETTERS]
    return float(np.mean(peaks)) >= LEAST_INK


@cache
def face_for_line(font: Path, line_height: int) -> ImageFont.FreeTypeFont:
    """The font at the size whose line box (ascent plus descent) is `line_height` pixels high."""
    ascent, descent = ImageFont.truetype(font, 200, layout_engine=ImageFont.Layout.BASIC).getmetrics()
    size = 200 * line_height / (ascent + descent)
    return ImageFont.truetype(font, size, layout_engine=ImageFont.Layout.BASIC)


def least_difference(glyphs: list[Glyph]) -> float:
    """The smallest share of ink in which any two glyphs differ; glyphs are centred, on one baseline."""
    stack = np.stack(glyphs)
    ink = stack.sum((1, 2))
    if not ink.all():
        return 0.0
    flat = stack.reshape(len(stack), -1)
    least = 1.0
    for shift in (-1, 0, 1):  # centring rounds to a pixel
        moved = np.roll(stack, shift, axis=2).reshape(len(stack), -1)
        for index in range(len(stack) - 1):
            distance = np.abs(flat[index] - moved[index + 1 :]).sum(1) / np.maximum(ink[index], ink[index + 1 :])
            least = min(least, float(distance.min()))
    return least


def small_capitals(glyphs: list[Glyph]) -> int:
    """How many of the 26 letters have the same shape, whatever its size, in both cases."""
    boxed = [_scaled(glyph) for glyph in glyphs]
    return sum(
        float(np.abs(small - capital).sum() / max(small.sum(), capital.sum(), 1.0)) < SMALL_CAPITAL_DIFFERENCE
        for small, capital in zip(boxed[:26], boxed[26:], strict=True)
    )


def _glyph(font: Path, letter: str) -> Glyph:
    """The letter's ink in 0..1, on the font's baseline, centred in a box three ems wide."""
    face = ImageFont.truetype(font, RULE_SIZE, layout_engine=ImageFont.Layout.BASIC)
    ink: Glyph = np.asarray(_drawn(face, letter), dtype=np.float32) / np.float32(255)
    columns = np.flatnonzero(ink.any(0))
    centred = np.zeros_like(ink)
    if len(columns):
        width = int(columns[-1] - columns[0] + 1)
        start = (ink.shape[1] - width) // 2
        centred[:, start : start + width] = ink[:, columns[0] : columns[-1] + 1]
    return centred


def _drawn(face: ImageFont.FreeTypeFont, letter: str) -> Image.Image:
    ascent, descent = face.getmetrics()
    image = Image.new("L", (int(3 * face.size), ascent + descent), 0)
    ImageDraw.Draw(image).text((face.size, 0), letter, fill=255, font=face)
    return image


def _scaled(glyph: Glyph) -> Glyph:
    rows, columns = np.flatnonzero(glyph.any(1)), np.flatnonzero(glyph.any(0))
    if not len(rows):
        return np.zeros((32, 32), dtype=np.float32)
    cut = glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray((cut * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BILINEAR)
    scaled: Glyph = np.asarray(image, dtype=np.float32) / np.float32(255)
    return scaled
