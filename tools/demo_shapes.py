"""Drawn shapes beside those of easy-vqa: other sizes, proportions and finishes, so that the demo model is not bound to
the 64 x 64 pixels of its data set."""

import math
import random

from PIL import Image, ImageDraw

from tools.demo_questions import COLOURS, SHAPES

Colour = tuple[int, int, int]

RGB: dict[str, Colour] = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}
"""The colours of easy-vqa, as Pillow names them (its green is CSS lime)."""
ALSO: dict[str, tuple[Colour, ...]] = {
    "black": ((25, 25, 25),),
    "gray": ((100, 100, 100), (160, 160, 160)),
    "red": ((220, 20, 40), (230, 50, 50)),
    "green": ((0, 128, 0), (0, 170, 60)),
    "blue": ((20, 60, 220), (40, 120, 240)),
    "teal": ((0, 150, 150),),
    "brown": ((139, 69, 19), (120, 70, 40)),
    "yellow": ((255, 215, 0), (240, 225, 50)),
}
"""Other shades that go by the same name."""
OVERSAMPLING = 3


def random_shape(rng: random.Random) -> tuple[Image.Image, str, str]:
    """An image of one shape, the shape's name and its colour's name."""
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    height = rng.randint(48, 200)
    width = round(height * rng.choice((1.0, 1.0, rng.uniform(0.7, 1.5))))
    extent = rng.uniform(0.12, 0.8) * min(width, height)
    centre = (rng.uniform(extent / 2, width - extent / 2), rng.uniform(extent / 2, height - extent / 2))
    ink = jittered(rng.choice((RGB[colour], *ALSO[colour])), rng)
    paper = (rng.randint(220, 255), rng.randint(220, 255), rng.randint(220, 255))
    while rng.random() < 0.4 or max(abs(i - p) for i, p in zip(ink, paper, strict=True)) < 90:
        paper = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    return draw(shape, ink, paper, (width, height), centre, extent, rng.uniform(-12, 12), rng), shape, colour


def draw(
    shape: str,
    ink: Colour,
    paper: Colour,
    size: tuple[int, int],
    centre: tuple[float, float],
    extent: float,
    tilt: float,
    rng: random.Random,
) -> Image.Image:
    """The shape with smooth edges; `extent` is its larger side in pixels, `tilt` is in degrees."""
    image = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), paper)
    x, y, radius = centre[0] * OVERSAMPLING, centre[1] * OVERSAMPLING, extent * OVERSAMPLING / 2
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    else:
        if shape == "triangle":
            corners = [(0.0, -radius), (-radius, radius), (radius, radius)]
        else:
            ratio = rng.uniform(0.35, 1.0)
            half_width, half_height = rng.choice(((radius, radius * ratio), (radius * ratio, radius)))
            corners = [(-half_width, -half_height), (half_width, -half_height)]
            corners += [(half_width, half_height), (-half_width, half_height)]
        sine, cosine = math.sin(math.radians(tilt)), math.cos(math.radians(tilt))
        pen.polygon([(x + cosine * u - sine * v, y + sine * u + cosine * v) for u, v in corners], fill=ink)
    return image.resize(size, Image.Resampling.BOX)


def jittered(colour: Colour, rng: random.Random) -> Colour:
    """Nearly the same colour."""
    red, green, blue = (min(255, max(0, c + rng.randint(-18, 18))) for c in colour)
    return red, green, blue
