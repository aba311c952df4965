"""Generated requests for measuring: every image and question is new, unless a share of repeats is asked for."""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

Size = tuple[int, int]  # pixels, width and height
WORDS = (
    "what",
    "where",
    "which",
    "shape",
    "colour",
    "word",
    "is",
    "there",
    "any",
    "in",
    "the",
    "image",
    "blue",
    "many",
)


@dataclass(frozen=True, slots=True)
class TrafficRequest:
    """One user's turn: an image file of its own and a question."""

    image: bytes
    question: str
    form: str = "jpeg"

    def messages(self) -> list[dict[str, object]]:
        """In the form in which Dify sends prompt messages."""
        data = base64.b64encode(self.image).decode()
        image = {"type": "image", "format": self.form, "mime_type": f"image/{self.form}", "base64_data": data}
        return [{"role": "user", "content": [image, {"type": "text", "data": self.question}]}]


def traffic(
    count: int,
    *,
    repeats: float = 0.0,
    size: Size = (128, 128),
    seed: int = 0,
    form: str = "jpeg",
    characters: int | None = None,
    detailed: bool = False,
) -> list[TrafficRequest]:
    """`count` requests of which exactly round(count * repeats) are copies of earlier ones, spread over the second half.

    A question is a few words, or as many as fill `characters`. Images are a few flat shapes; `detailed` ones have as
    much to decode as photographs. The same arguments give the same requests, so that runs can be compared.
    """
    random_source = random.Random(seed)
    copies = round(count * repeats)
    requests = [_request(random_source, size, form, characters, detailed) for _ in range(count - copies)]
    for _ in range(copies):
        original = random_source.randrange(len(requests) // 2)
        requests.insert(random_source.randrange(len(requests) // 2, len(requests) + 1), requests[original])
    return requests


def _request(
    random_source: random.Random, size: Size, form: str, characters: int | None, detailed: bool
) -> TrafficRequest:
    picture = _detail(random_source, size) if detailed else Image.new("RGB", size, _colour(random_source))
    draw = ImageDraw.Draw(picture)
    for _ in range(random_source.randint(2, 6)):
        left, top = random_source.randrange(size[0] - 8), random_source.randrange(size[1] - 8)
        right, bottom = random_source.randrange(left + 4, size[0]), random_source.randrange(top + 4, size[1])
        shape = random_source.choice([draw.rectangle, draw.ellipse])
        shape((left, top, right, bottom), fill=_colour(random_source))
    encoded = io.BytesIO()
    picture.save(encoded, form, quality=85)
    return TrafficRequest(encoded.getvalue(), _question(random_source, characters), form)


def _detail(random_source: random.Random, size: Size) -> Image.Image:
    """Soft noise: about 80 kB of JPEG for 640x480 pixels, as a photograph has."""
    coarse = max(1, size[0] // 4), max(1, size[1] // 4)
    noise = Image.frombytes("RGB", coarse, random_source.randbytes(3 * coarse[0] * coarse[1]))
    return noise.resize(size, Image.Resampling.BILINEAR)


def _question(random_source: random.Random, characters: int | None) -> str:
    if characters is None:
        return " ".join(random_source.choices(WORDS, k=4)) + "?"
    text = " ".join(random_source.choices(WORDS, k=characters))  # every word is longer than one character
    return text[: characters - 1] + "?"


def _colour(random_source: random.Random) -> tuple[int, int, int]:
    return (random_source.randrange(256), random_source.randrange(256), random_source.randrange(256))
