"""An image file to an upright RGB image."""

from __future__ import annotations

import io
import math
import struct
import warnings

from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from engine.errors import InvalidImage
from engine.preprocess.formats import SUPPORTED, describe, find_opener
from engine.preprocess.rgb import to_rgb

# `decode_image` checks the size against the setting first; beyond that, Pillow's warning is noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_BAD_EXIF = (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, EOFError, struct.error)


def decode_image(data: bytes, *, max_megapixels: float) -> Image.Image:
    """Decode JPEG, PNG, WebP, GIF (first frame), BMP or TIFF to RGB, turned as its EXIF orientation says.

    Transparent parts become white; 16-bit and float values are scaled to 8 bits. The size limit is checked on the
    header, before any pixel is decoded. Raises InvalidImage.
    """
    image = _read_header(data, max_megapixels)
    size, turn = _upright_size(image), _TURNS.get(_orientation(image))
    try:
        image.load()
        rgb = to_rgb(image)
    except InvalidImage:
        raise
    except Exception as error:  # decoders fail in any way on hostile bytes, and this is their only border
        raise _damaged(image.format or "", error) from error
    upright = rgb if turn is None else rgb.transpose(turn)
    if upright.size != size:
        raise InvalidImage(f"the image is damaged: its header promises {size} pixels, the file holds {upright.size}")
    return upright


def image_size(data: bytes, *, max_megapixels: float = math.inf) -> tuple[int, int]:
    """(width, height) that `decode_image` would give, from the header alone. Raises InvalidImage."""
    return _upright_size(_read_header(data, max_megapixels))


def _read_header(data: bytes, max_megapixels: float) -> ImageFile:
    found = find_opener(data)
    if found is None:
        raise InvalidImage(f"this is not an image that can be read: it is {describe(data)}; send {SUPPORTED}")
    name, opener = found
    try:
        image = opener(io.BytesIO(data))
    except Exception as error:  # as above, for parsers of headers
        raise _damaged(name, error) from error
    if image.width < 1 or image.height < 1:
        raise InvalidImage(f"the image is {image.width}x{image.height} pixels; it must have at least one")
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise InvalidImage(
            f"this image is {megapixels:.4g} megapixels ({image.width}x{image.height}); the limit is {max_megapixels:g}"
            " (max_image_megapixels)"
        )
    return image


def _damaged(name: str, error: Exception) -> InvalidImage:
    if isinstance(error, Image.DecompressionBombError):
        return InvalidImage(f"this {name} image is larger than the decoder's own limit ({error}); send PNG or JPEG")
    reason = str(error) or type(error).__name__
    return InvalidImage(
        f"the image is truncated or damaged and cannot be read as {name} ({reason}); send the whole file"
    )


def _upright_size(image: ImageFile) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) in _SIDEWAYS else image.size


def _orientation(image: ImageFile) -> int:
    """EXIF tag 274 as far as the header tells; 1 (upright) when absent or unreadable."""
    if isinstance(image, TiffImageFile):
        return 1  # Pillow turns TIFF files itself and reports the size after that
    try:
        # The base class's method: PNG's own decodes the whole image in search of a late chunk.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except _BAD_EXIF:
        return 1
