"""Which image format a file has, judged by its first bytes."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

SUPPORTED = "JPEG, PNG, WebP, GIF, BMP or TIFF"

Opener = Callable[[io.BytesIO], ImageFile]

# Each format's own class instead of Image.open: no search through all plugins, and no global pixel limit beside ours.
_OPENERS: tuple[tuple[bytes, str, Opener], ...] = (
    (b"\xff\xd8\xff", "JPEG", JpegImagePlugin.jpeg_factory),
    (b"\x89PNG\r\n\x1a\n", "PNG", PngImagePlugin.PngImageFile),
    (b"GIF87a", "GIF", GifImagePlugin.GifImageFile),
    (b"GIF89a", "GIF", GifImagePlugin.GifImageFile),
    (b"BM", "BMP", BmpImagePlugin.BmpImageFile),
    (b"II*\0", "TIFF", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", "TIFF", TiffImagePlugin.TiffImageFile),
    (b"II+\0", "TIFF", TiffImagePlugin.TiffImageFile),
    (b"MM\0+", "TIFF", TiffImagePlugin.TiffImageFile),
)
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "a PDF document"),
    (b"\0\0\1\0", "an ICO icon"),
    (b"8BPS", "a Photoshop document"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"PK\3\4", "a ZIP archive or Office document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"RIFF", "audio or video in RIFF"),
    (b"data:", "a data URL; send the bytes it encodes"),
    (b"iVBORw0KGgo", "base64 text; send the bytes it encodes"),
    (b"/9j/", "base64 text; send the bytes it encodes"),
)
_BRANDS = {b"avif": "an AVIF image", b"avis": "an AVIF image", b"heic": "a HEIC image", b"heix": "a HEIC image",
           b"hevc": "a HEIC image", b"mif1": "a HEIC image", b"msf1": "a HEIC image"}  # fmt: skip


def find_opener(data: bytes) -> tuple[str, Opener] | None:
    """The format's name and how to read its header; None when the format is not supported."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP", WebPImagePlugin.WebPImageFile
    return next(((name, opener) for magic, name, opener in _OPENERS if data.startswith(magic)), None)


def describe(data: bytes) -> str:
    """What an unsupported file seems to be, for an error message."""
    if not data:
        return "empty"
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "an MP4 or similar video")
    for magic, name in _FOREIGN:
        if data.startswith(magic):
            return name
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "an SVG drawing"
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if head and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return "text"
    return f"{len(data)} bytes of an unknown format"
