"""Image files of every supported kind, and files that must be refused."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from engine.errors import InvalidImage
from engine.preprocess import decode_image, image_size

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


def quarters(width: int = 32, height: int = 16) -> Image.Image:
    """Four colours, so that every turn and flip shows."""
    image = Image.new("RGB", (width, height))
    boxes = [(0, 0), (width // 2, 0), (0, height // 2), (width // 2, height // 2)]
    for colour, corner in zip((RED, GREEN, BLUE, WHITE), boxes, strict=True):
        image.paste(colour, (*corner, corner[0] + width // 2, corner[1] + height // 2))
    return image


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes, limit: float = 50) -> Image.Image:
    image = decode_image(data, max_megapixels=limit)
    assert image.mode == "RGB"
    return image


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return tuple(np.asarray(image)[y, x].tolist())


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF"])
def test_lossless_formats_give_the_exact_pixels(form: str) -> None:
    assert np.array_equal(np.asarray(decoded(encoded(quarters(), form))), np.asarray(quarters()))


def test_jpeg_and_webp_give_about_the_pixels() -> None:
    assert features.check("webp")
    for data in (encoded(quarters(), "JPEG", quality=95, subsampling=0), encoded(quarters(), "WEBP", lossless=True)):
        assert np.abs(np.asarray(decoded(data), int) - np.asarray(quarters(), int)).mean() < 3


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    for form in ("GIF", "WEBP", "TIFF"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.allclose(pixel(decoded(data), 4, 4), RED, atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_turns_the_image_and_its_size(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    data = encoded(quarters(), form, exif=exif, **options)
    image = decoded(data)
    first, second, third = {
        1: (RED, GREEN, BLUE), 2: (GREEN, RED, WHITE), 3: (WHITE, BLUE, GREEN), 4: (BLUE, WHITE, RED),
        5: (RED, BLUE, GREEN), 6: (BLUE, RED, WHITE), 7: (WHITE, GREEN, BLUE), 8: (GREEN, WHITE, RED),
    }[orientation]  # fmt: skip
    width, height = image.size
    assert np.allclose(pixel(image, 2, 2), first, atol=8)
    assert np.allclose(pixel(image, width - 3, 2), second, atol=8)
    assert np.allclose(pixel(image, 2, height - 3), third, atol=8)
    assert image_size(data) == image.size == ((16, 32) if orientation >= 5 else (32, 16))


def test_orientation_after_the_pixels_of_a_png_is_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(quarters(), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert decoded(data).size == image_size(data) == (16, 32)
    assert decoded(late).size == image_size(late) == (32, 16)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_compressed_tiff_is_turned_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(quarters(), "TIFF", exif=exif, compression="tiff_lzw")
    assert decoded(data).size == image_size(data) == ((16, 32) if orientation == 6 else (32, 16))
    assert pixel(decoded(data), 2, 2) == (BLUE if orientation == 6 else WHITE)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_does_not_spoil_the_image() -> None:
    data = encoded(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decoded(data).size == image_size(data) == (32, 16)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    grey = Image.new("LA", (4, 4), (0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(decoded(encoded(clear, "PNG")), 1, 1) == WHITE
    assert pixel(decoded(encoded(clear, "WEBP", lossless=True)), 1, 1) == WHITE
    assert pixel(decoded(encoded(clear, "TIFF")), 1, 1) == WHITE
    assert pixel(decoded(encoded(half, "PNG")), 1, 1) == (255, 127, 127)
    assert pixel(decoded(encoded(grey, "PNG")), 1, 1) == WHITE
    assert pixel(decoded(encoded(palette, "PNG", transparency=0)), 1, 1) == WHITE
    assert pixel(decoded(encoded(palette, "GIF", transparency=0)), 1, 1) == WHITE
    assert pixel(decoded(encoded(palette, "PNG")), 1, 1) == (0, 0, 0)
    assert pixel(decoded(encoded(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED)), 1, 1) == WHITE
    assert pixel(decoded(encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7)), 1, 1) == WHITE


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form: str) -> None:
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    image = decoded(encoded(Image.fromarray(levels), form))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_wide_integers_and_floats_are_scaled() -> None:
    def levels(values: Any) -> list[int]:
        return [int(value) for value in np.asarray(decoded(encoded(Image.fromarray(values), "TIFF")))[0, :, 1]]

    assert levels(np.array([[0, 128, 255]], np.int32)) == [0, 128, 255]
    assert levels(np.array([[0, 32896, 65535]], np.int32)) == [0, 128, 255]
    assert levels(np.array([[0.0, 0.5, 1.0]], np.float32)) == [0, 128, 255]
    assert levels(np.array([[0.0, 127.6, 255.0]], np.float32)) == [0, 128, 255]
    assert levels(np.array([[-1.0, 0.0, 1.0]], np.float32)) == [0, 128, 255]
    assert levels(np.array([[np.nan, 0.0, 1.0]], np.float32)) == [0, 0, 255]


def test_cmyk_is_converted_and_adobes_inverted_cmyk_too() -> None:
    cmyk = quarters().convert("CMYK")
    for data in (encoded(cmyk, "TIFF"), encoded(cmyk, "JPEG", quality=95)):
        assert np.abs(np.asarray(decoded(data), int) - np.asarray(quarters(), int)).mean() < 6
    assert b"Adobe" in encoded(cmyk, "JPEG")


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    black_and_white = Image.new("L", (8, 8), 255)
    black_and_white.paste(0, (0, 0, 4, 8))
    image = decoded(encoded(black_and_white.convert(mode), "TIFF"))
    assert pixel(image, 1, 1) == (0, 0, 0)
    assert pixel(image, 6, 1) == WHITE


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels and which holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_from_the_header_without_noise() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with pytest.raises(
            InvalidImage, match=r"this image is 120 megapixels .* the limit is 50 \(max_image_megapixels"
        ):
            decode_image(bomb(12_000, 10_000), max_megapixels=50)
        assert image_size(bomb(60_000, 60_000)) == (60_000, 60_000)


def test_a_limit_above_pillows_own_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {form: encoded(quarters(), form) for form in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for form in ("JPEG", "PNG", "BMP", "GIF"):
        assert decoded(files[form]).size == (32, 16)
    for form in ("TIFF", "WEBP"):
        with pytest.raises(InvalidImage, match=r"larger than the decoder's own limit"):
            decoded(files[form])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_refused(form: str, part: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, form)
    with pytest.raises(InvalidImage, match=r"the image is truncated or damaged"):
        decoded(data[: max(16, int(len(data) * part))])


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (b"", "it is empty"),
        (b"hello", "it is text"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"\0\0\0\x18ftypavif", "an AVIF image"),
        (b"%PDF-1.7", "a PDF document"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"data:image/png;base64,iVBORw0KGgo=", "a data URL"),
        (b"\x00\x01\x02\x03" * 5, "20 bytes of an unknown format"),
        (b"RIFF\0\0\0\0WAVE", "audio or video"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, seen: str) -> None:
    for read in (decoded, image_size):
        with pytest.raises(InvalidImage, match="send JPEG, PNG, WebP, GIF, BMP or TIFF") as raised:
            read(data)
        assert seen in str(raised.value)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(InvalidImage, match=r"pixel|damaged"):
        decoded(bomb(0, 5))
    empty_gif = b"GIF89a\0\0\0\0\0\0\0;"
    with pytest.raises(InvalidImage, match=r"pixel|damaged"):
        decoded(empty_gif)


def test_one_pixel_is_an_image() -> None:
    assert decoded(encoded(Image.new("RGB", (1, 1), RED), "PNG")).size == (1, 1)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_raise_anything_else() -> None:
    random = np.random.default_rng(1)
    files = [encoded(quarters(), form) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    for number in range(600):
        data = bytearray(files[number % len(files)])
        for place in random.integers(4, len(data), 6):
            data[place] = random.integers(256)
        with suppress(InvalidImage):
            image_size(bytes(data))
        with suppress(InvalidImage):
            assert decode_image(bytes(data), max_megapixels=1).size == image_size(bytes(data))


def test_many_threads_decode_at_once() -> None:
    files = [encoded(quarters(), form) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")] * 8
    expected = [np.asarray(decoded(data)) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for image, known in zip(pool.map(decoded, files), expected, strict=True):
            assert np.array_equal(np.asarray(image), known)
