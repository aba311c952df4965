"""Questions about images in Dify's words."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
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


def children_of(pid: int) -> list[int]:
    """The processes that a process started and that still run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def is_gone(pid: int) -> bool:
    """A process that ended but was not yet waited for counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
