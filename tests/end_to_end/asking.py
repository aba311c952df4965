"""Questions about images in Dify's words."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

from PIL import Image, ImageDraw

from cli.daemon import Session


def picture(shape: str = "circle", color: str = "red", size: int = 64) -> bytes:
    """A PNG of one shape on a light background, as easy-vqa draws them."""
    image = Image.new("RGB", (size, size), (226, 250, 228))
    box = (size // 4, size // 4, 3 * size // 4, 3 * size // 4)
    draw = ImageDraw.Draw(image)
    draw.ellipse(box, fill=color) if shape == "circle" else draw.rectangle(box, fill=color)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def about(image: bytes, question: str) -> list[dict[str, Any]]:
    data = base64.b64encode(image).decode()
    content = [
        {"type": "image", "format": "png", "mime_type": "image/png", "base64_data": data},
        {"type": "text", "data": question},
    ]
    return [{"role": "user", "content": content}]


def text_of(chunks: Session | Iterable[dict[str, Any]]) -> str:
    return "".join(chunk["delta"]["message"]["content"] for chunk in chunks)
