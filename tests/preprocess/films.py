"""Video files made by the tests, and their frames as a plain decoder gives them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Film:
    """A file, all its frames [n, height, width, 3], and how many there are in a second."""

    file: bytes
    frames: NDArray[np.uint8]
    fps: float


def film(
    frames: int, size: tuple[int, int], *, fps: float = 10, seed: int = 0, container: str = "mp4", codec: str = "mpeg4"
) -> Film:
    """Noise that wanders, `size` is (width, height), both even."""
    file = video_file(frames, size, fps=fps, seed=seed, container=container, codec=codec)
    with av.open(io.BytesIO(file), "r") as source:
        decoded = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
        rate = source.streams.video[0].average_rate
    assert len(decoded) == frames
    assert rate is not None
    return Film(file, np.stack(decoded), float(rate))


def video_file(
    frames: int,
    size: tuple[int, int],
    *,
    fps: float = 10,
    seed: int = 0,
    container: str = "mp4",
    codec: str = "mpeg4",
    times: list[int] | None = None,
) -> bytes:
    """`times` are those of the frames, in thousandths of a second, where they are not evenly spaced."""
    width, height = size
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    picture = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as target:
        stream = target.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * number, axis=1), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return file.getvalue()
