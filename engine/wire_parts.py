"""Parts of a message as `wire` sends them."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from engine.errors import InvalidRequest
from engine.request import Image, ImageUrl, Part, Text, Video, VideoUrl

_NAMES = {Image: "image", ImageUrl: "image_url", Video: "video", VideoUrl: "video_url"}


def part_to_plain(part: Part) -> Any:
    """A text becomes a string, an image bytes; one to be fetched or of low detail an array, as are videos."""
    match part:
        case Text(text):
            return text
        case Image(data, "high"):
            return data
        case _:
            return [_NAMES[type(part)], *astuple(part)]


def part_from_plain(plain: Any) -> Part:
    """Raises InvalidRequest, also for a video that is too large."""
    match plain:
        case str(text):
            return Text(text)
        case bytes(data):
            return Image(data)
        case ["image", bytes(data), "low" | "high" as detail]:
            return Image(data, detail)
        case ["image_url", str(url), "low" | "high" as detail]:
            return ImageUrl(url, detail)
        case ["video", bytes(data)]:
            return Video(data)
        case ["video_url", str(url)]:
            return VideoUrl(url)
    raise InvalidRequest(f"the request is malformed: a part must be text, image or video, not {type(plain).__name__}")
