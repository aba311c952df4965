"""One printed word per image: case-sensitive, varied in font, size, colours, background and tilt, saved as JPEG.

Everything is drawn from a seed. The image is the word's line box with a modest margin, so that the size of the letters
within it tells c from C.
"""

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from evaluation.fonts import face_for_line, usable_fonts
from evaluation.samples import Sample
from evaluation.words import in_some_case, words

QUESTIONS = ("read the word", "what does the image say?", "what word is printed?", "what is the printed word?")
LINE_HEIGHTS = (16, 40)
"""Pixels from the ascender's top to the descender's bottom."""
MOST_TILT = 3.0
QUALITY = 70
LEAST_CONTRAST = 100
"""Least difference of the luma (0..255) of ink and background."""
NOISE_SIZE = (1024, 512)

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Print:
    """How one word is printed. `margins` are left, top, right and bottom, in line heights; `tilt` is in degrees."""

    font: Path
    line_height: int
    ink: Colour
    paper: Colour
    background: str
    tilt: float
    margins: tuple[float, float, float, float]


def test_samples(count: int = 1000, seed: int = 0) -> Iterator[Sample]:  # noqa: PT028 (not a test)
    """`count` different words that training never sees. The same count and seed always give the same files."""
    rng = random.Random(f"printed words {seed}")
    for word in rng.sample(words("test"), count):
        text = in_some_case(word, rng)
        image = printed(text, random_print(rng), rng)
        yield Sample(image=encoded(image, QUALITY), question=rng.choice(QUESTIONS), answer=text)


def random_print(rng: random.Random, line_heights: tuple[int, int] = LINE_HEIGHTS) -> Print:
    """A font that passes the rule, a size, two colours that can be told apart, a background, a tilt and margins."""
    ink, paper = contrasting_colours(rng)
    return Print(
        font=rng.choice(usable_fonts()),
        line_height=rng.randint(*line_heights),
        ink=ink,
        paper=paper,
        background=rng.choice(("plain", "gradient", "noise", "texture")),
        tilt=rng.uniform(-MOST_TILT, MOST_TILT),
        margins=(rng.uniform(0.1, 0.5), rng.uniform(0, 0.2), rng.uniform(0.1, 0.5), rng.uniform(0, 0.2)),
    )


def contrasting_colours(rng: random.Random) -> tuple[Colour, Colour]:
    """Ink and paper whose luma differs by at least LEAST_CONTRAST."""
    while True:
        ink, paper = _colour(rng), _colour(rng)
        if abs(_luma(ink) - _luma(paper)) >= LEAST_CONTRAST:
            return ink, paper


def printed(text: str, style: Print, rng: random.Random) -> Image.Image:
    """The word on its background; `rng` draws the background."""
    mask = ink_mask(text, style)
    image = background(style.background, mask.size, style.paper, rng)
    image.paste(style.ink, (0, 0), mask)
    return image


def ink_mask(text: str, style: Print) -> Image.Image:
    """Where the ink is (0..255): the line box with its margins, tilted; the box grows so that nothing is cut off."""
    face = face_for_line(style.font, style.line_height)
    ascent, descent = face.getmetrics()
    left, _, right, _ = face.getbbox(text, anchor="ls")
    margin_left, margin_top, margin_right, margin_bottom = (round(m * style.line_height) for m in style.margins)
    width = math.ceil(right - left) + margin_left + margin_right
    height = ascent + descent + margin_top + margin_bottom
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).text((margin_left - left, margin_top + ascent), text, fill=255, font=face, anchor="ls")
    return mask.rotate(style.tilt, Image.Resampling.BICUBIC, expand=True)


def background(kind: str, size: tuple[int, int], paper: Colour, rng: random.Random) -> Image.Image:
    """A plain, graded, noisy or textured area around one colour."""
    match kind:
        case "gradient":
            corners = b"".join(bytes(_near(paper, 28, rng)) for _ in range(4))
            return Image.frombytes("RGB", (2, 2), corners).resize(size, Image.Resampling.BILINEAR)
        case "noise":
            noise = noise_bank(rng.choice((4, 8, 12)))
            x, y = rng.randrange(NOISE_SIZE[0] - size[0]), rng.randrange(NOISE_SIZE[1] - size[1])
            grain = noise.crop((x, y, x + size[0], y + size[1]))
            return ImageChops.add(Image.new("RGB", size, paper), grain, scale=1, offset=-128)
        case "texture":
            columns, rows = rng.randint(2, 14), rng.randint(1, 5)
            cells = b"".join(bytes(_near(paper, 18, rng)) for _ in range(columns * rows))
            smooth = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BICUBIC))
            return Image.frombytes("RGB", (columns, rows), cells).resize(size, smooth)
        case "plain":
            return Image.new("RGB", size, paper)
    raise ValueError(f"no background is called {kind!r}")


@cache
def noise_bank(strength: int) -> Image.Image:
    """Grey-centred Gaussian noise with this standard deviation; crops of it are quicker than drawing noise anew."""
    noise = np.random.default_rng(strength).normal(128, strength, (NOISE_SIZE[1], NOISE_SIZE[0], 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, quality: int) -> bytes:
    """The image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _colour(rng: random.Random) -> Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _near(colour: Colour, distance: int, rng: random.Random) -> Colour:
    shift = rng.randint(-distance, distance)  # one shift for all channels keeps the hue; a little more per channel
    red, green, blue = (min(255, max(0, c + shift + rng.randint(-8, 8))) for c in colour)
    return red, green, blue


def _luma(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
