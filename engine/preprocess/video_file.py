"""A video file to upright RGB frames, by FFmpeg through PyAV, as many as are wanted and never more in memory."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from engine.errors import InvalidVideo
from engine.preprocess.formats import describe
from engine.preprocess.image_input import IsWanted, always_wanted, require_wanted

SUPPORTED = "MP4, MOV, WebM, Matroska, AVI or MPEG"
MAX_SECONDS = 1800
MAX_FRAMES = 120 * MAX_SECONDS  # that are decoded, whether they are wanted or not
DECODE_S = 120.0
_THREADS = 2  # for decoding, beside whatever else computes
_RATE = 24.0  # frames in a second where the file does not tell; transformers assumes it, too
_NEARLY_ALL = 0.9  # of the frames that the index promises: encoders leave out the last ones, and hide some
# What FFmpeg raises is also one of Python's own errors; PyAV adds those of arguments that a hostile header makes odd.
_BAD_FILE = (av.FFmpegError, ValueError, OSError, EOFError, ArithmeticError, MemoryError, LookupError)

# By name, because some formats that FFmpeg recognises by itself are lists of other files and addresses to open.
_FORMATS: tuple[tuple[int, bytes, str], ...] = (
    *((4, box, "mov") for box in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"\0\0\1\xba", "mpeg"),
    (0, b"\0\0\1\xb3", "mpegvideo"),
    (0, b"FLV\1", "flv"),
    (0, b"OggS", "ogg"),
    (0, b"\x47", "mpegts"),
)
_WITHOUT_TIMES = ("avi", "mpegvideo")  # of presentation; what FFmpeg makes up is out of order


@dataclass(frozen=True, slots=True, eq=False)
class VideoFile:
    """What the index of a video file tells; nothing but its first frame was decoded.

    `width` and `height` are those of upright frames. `times` are the frames' presentation times in order, in units of
    the stream; empty where the file has none.
    """

    data: bytes = field(repr=False)
    container: str
    width: int
    height: int
    frames: int
    fps: float
    turns: int  # by 90 degrees counter-clockwise, until frames are upright
    times: tuple[int, ...] = field(repr=False)


def read_video(data: bytes, *, max_megapixels: float = math.inf, is_wanted: IsWanted = always_wanted) -> VideoFile:
    """Raises InvalidVideo for what is no video, is damaged, or is beyond the limits, Cancelled once nobody wants it."""
    container = _container(data)
    try:
        with _open(data, container) as file:
            return _read(data, container, file, max_megapixels, is_wanted)
    except InvalidVideo:
        raise
    except _BAD_FILE as error:
        raise _damaged(error) from error


def video_frames(
    video: VideoFile, indices: Sequence[int], is_wanted: IsWanted = always_wanted
) -> Iterator[NDArray[np.uint8]]:
    """[height, width, 3] for each of the growing `indices`, one in memory at a time.

    Raises InvalidVideo, and Cancelled soon after nobody wants them any more.
    """
    try:
        with _open(video.data, video.container) as file:
            for picture in _wanted(video, _decoded(file, is_wanted), list(indices)):
                yield _upright(video, picture)
    except InvalidVideo:
        raise
    except _BAD_FILE as error:
        raise _damaged(error) from error


def _open(data: bytes, container: str) -> InputContainer:
    return av.open(io.BytesIO(data), "r", format=container)


def _container(data: bytes) -> str:
    for start, magic, name in _FORMATS:
        if data[start : start + len(magic)] == magic and (name != "mpegts" or data[188:189] == magic):
            return name
    raise InvalidVideo(f"this is not a video that can be read: it is {describe(data)}; send {SUPPORTED}")


def _read(data: bytes, container: str, file: InputContainer, max_megapixels: float, is_wanted: IsWanted) -> VideoFile:
    stream = _stream(file)
    _require_size(stream.codec_context.width, stream.codec_context.height, max_megapixels)
    times: list[int | None] = []
    for packet in file.demux(stream):
        if packet.size and not packet.is_discard:
            times.append(packet.pts)
    if not times:
        raise InvalidVideo("the video has no frames")
    if stream.frames > len(times) * 1.01 + 1 and not _NEARLY_ALL * stream.frames < len(times):
        raise InvalidVideo(
            f"the video is truncated: its index promises {stream.frames} frames, {len(times)} are there;"
            " send the whole file"
        )
    known = sorted({time for time in times if time is not None})
    if len(known) < len(times) or container in _WITHOUT_TIMES:
        known = []
    frames, fps = len(times), _rate(stream, known)
    if frames > MAX_FRAMES or frames / fps > MAX_SECONDS:
        raise InvalidVideo(
            f"the video is {frames / fps:.0f} seconds long ({frames} frames); the limit is {MAX_SECONDS} seconds:"
            " cut it, or send a part"
        )
    first = _first_frame(data, container, is_wanted)
    _require_size(first.width, first.height, max_megapixels)
    turns = round(first.rotation / 90) % 4
    size = (first.height, first.width) if turns % 2 else (first.width, first.height)
    return VideoFile(data, container, *size, frames, fps, turns, tuple(known))


def _stream(file: InputContainer) -> VideoStream:
    """The first that is a film and not the picture on a record's cover."""
    covers = av.stream.Disposition.attached_pic
    for stream in file.streams.video:
        if not stream.disposition & covers:
            if stream.codec_context is None:  # whatever its declared type says
                raise InvalidVideo("the video is damaged, or made by an encoder that cannot be read; send H.264 in MP4")
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = _THREADS
            return stream
    raise InvalidVideo("the file has sound but no video; send a video, or leave it out")


def _first_frame(data: bytes, container: str, is_wanted: IsWanted) -> VideoFrame:
    with _open(data, container) as file:
        for frame in _decoded(file, is_wanted):
            return frame
    raise InvalidVideo("the video has no frame that can be read; send the whole file")


def _rate(stream: VideoStream, times: Sequence[int]) -> float:
    """Frames in a second, on average."""
    rate = float(stream.average_rate or 0)
    if not 0 < rate < math.inf and len(times) > 1 and stream.time_base:
        rate = (len(times) - 1) / float((times[-1] - times[0]) * stream.time_base)
    return rate if 0 < rate < math.inf else _RATE


def _require_size(width: int, height: int, max_megapixels: float) -> None:
    if width * height / 1e6 > max_megapixels:
        raise InvalidVideo(
            f"the video is {width}x{height} pixels; the limit is {max_megapixels:g} megapixels (max_image_megapixels)"
        )


def _decoded(file: InputContainer, is_wanted: IsWanted) -> Iterator[VideoFrame]:
    """All frames. Looks at the clock between packets, of which some give none."""
    until = time.monotonic() + DECODE_S
    for packet in file.demux(_stream(file)):
        require_wanted(is_wanted)
        if time.monotonic() > until:
            raise InvalidVideo(f"the video was not decoded within {DECODE_S:g} seconds; send a shorter or smaller one")
        for frame in packet.decode():
            assert isinstance(frame, VideoFrame)
            yield frame


def _wanted(video: VideoFile, decoded: Iterator[VideoFrame], indices: list[int]) -> Iterator[VideoFrame]:
    """The frames at these indices: the first from each one's time on, so that one that is not shown shifts none."""
    last: VideoFrame | None = None
    index = -1
    for index, frame in enumerate(decoded):
        last = frame
        while indices and _is_there(video, frame, index, indices[0]):
            indices.pop(0)
            yield frame
        if not indices:
            return
    if last is None or index + 1 < _NEARLY_ALL * video.frames:
        raise InvalidVideo(
            f"the video is truncated or damaged: of {video.frames} frames {index + 1} can be read; send the whole file"
        )
    yield from [last] * len(indices)


def _is_there(video: VideoFile, frame: VideoFrame, index: int, wanted: int) -> bool:
    return frame.pts >= video.times[wanted] if video.times and frame.pts is not None else index >= wanted


def _upright(video: VideoFile, frame: VideoFrame) -> NDArray[np.uint8]:
    size = (frame.height, frame.width) if video.turns % 2 else (frame.width, frame.height)
    if size != (video.width, video.height):
        raise InvalidVideo(
            f"the video changes its size from {video.width}x{video.height} to {size[0]}x{size[1]} pixels;"
            " convert it to one size"
        )
    picture: NDArray[Any] = np.rot90(frame.to_ndarray(format="rgb24"), video.turns)
    return picture


def _damaged(error: Exception) -> InvalidVideo:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return InvalidVideo(f"the video is truncated or damaged and cannot be read ({reason}); send the whole file")
