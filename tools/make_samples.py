"""Draws the images of samples/ that a new user can ask the demo model about.

    python -m tools.make_samples

They are drawn here, in the manner of easy-vqa and of the printed words, and copied from neither. The words are on the
side of the split that training never saw; their fonts are Open Sans and Roboto (Apache 2.0) and Lato (OFL).
"""

import random
from pathlib import Path

from PIL import Image

from evaluation.fonts import usable_fonts
from evaluation.printed_words import QUALITY, Colour, Print, printed
from evaluation.words import split_of
from tools.demo_shapes import RGB, draw

FOLDER = Path(__file__).parent.parent / "samples"
SHAPES: tuple[tuple[str, str, str, Colour, tuple[int, int], float], ...] = (
    ("blue_triangle.png", "triangle", "blue", (244, 241, 232), (160, 160), 84.0),
    ("red_circle.png", "circle", "red", (232, 240, 250), (240, 180), 96.0),
    ("teal_rectangle.jpg", "rectangle", "teal", (250, 244, 250), (128, 128), 62.0),
)
"""File, shape, colour, paper, size and extent in pixels."""
WORDS: tuple[tuple[str, str, str, int, Colour, Colour, str, float], ...] = (
    ("printed_word.jpg", "Coffee", "OpenSans-Semibold", 40, (30, 41, 82), (240, 225, 190), "gradient", 1.5),
    ("printed_capitals.png", "MARBLE", "Roboto-Medium", 32, (250, 245, 235), (20, 90, 85), "noise", 0.0),
    ("printed_small.jpg", "guitar", "Lato-Bold", 24, (120, 20, 40), (225, 230, 235), "texture", -2.0),
)
"""File, text, font, line height, ink, paper, background and tilt in degrees."""


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    rng = random.Random("samples")
    for name, shape, colour, paper, size, extent in SHAPES:
        centre = (size[0] * 0.45, size[1] * 0.55)
        save(draw(shape, RGB[colour], paper, size, centre, extent, 0.0, rng), name)
    fonts = {font.stem: font for font in usable_fonts()}
    for name, text, font, height, ink, paper, background, tilt in WORDS:
        if split_of(text) != "test":
            raise SystemExit(f"training may have seen {text!r}; choose another word for {name}")
        style = Print(fonts[font], height, ink, paper, background, tilt, margins=(0.35, 0.15, 0.35, 0.15))
        save(printed(text, style, rng), name)


def save(image: Image.Image, name: str) -> None:
    """PNG or JPEG by the name's ending."""
    image.save(FOLDER / name, **({"quality": QUALITY} if name.endswith("jpg") else {"optimize": True}))


if __name__ == "__main__":
    main()
