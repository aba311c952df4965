"""Video files of many kinds give the frames that a plain decoder gives; what is none is refused in a sentence."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engine.errors import InvalidVideo
from engine.preprocess import video_file as module
from engine.preprocess.video_file import VideoFile, read_video, video_frames
from tests.preprocess.films import Film, film, video_file

KINDS = [
    ("mp4", "mpeg4"),
    ("mp4", "libx264"),
    ("mov", "mjpeg"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("matroska", "libx264"),
    ("avi", "libx264"),
    ("mpegts", "mpeg2video"),
    ("mpeg", "mpeg2video"),
    ("mpeg1video", "mpeg1video"),
]


@pytest.mark.parametrize(("container", "codec"), KINDS)
def test_frames_are_those_that_a_plain_decoder_gives(container: str, codec: str) -> None:
    made = film(40, (66, 50), fps=25, container=container, codec=codec)
    video = read_video(made.file)
    assert (video.width, video.height, video.frames, video.fps) == (66, 50, 40, 25.0)
    indices = [0, 1, 7, 7, 20, 39]
    found = list(video_frames(video, indices))
    assert np.array_equal(np.stack(found), made.frames[indices])


@pytest.fixture(scope="module")
def short() -> Film:
    return film(30, (64, 48))


def turned(file: bytes, degrees: int) -> bytes:
    """With a display matrix for the film, as telephones write it, in an MP4's track header."""
    sine, cosine = {90: (1, 0), 180: (0, -1), 270: (-1, 0)}[degrees]
    track = file.index(b"tkhd") + 44
    matrix = struct.pack(">9i", cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30)
    return file[:track] + matrix + file[track + 36 :]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_are_upright(degrees: int, short: Film) -> None:
    video = read_video(turned(short.file, degrees))
    assert (video.width, video.height) == ((64, 48) if degrees == 180 else (48, 64))
    (first,) = video_frames(video, [0])
    assert np.array_equal(first, np.rot90(short.frames[0], -degrees // 90))  # the matrix turns clockwise


def test_frames_at_uneven_times_are_counted_not_timed() -> None:
    times = [0, 10, 20, 500, 510, 1500, 1540, 1999]
    file = video_file(len(times), (64, 48), times=times)
    video = read_video(file)
    assert video.frames == len(times)
    assert 3 < video.fps < 5
    with av.open(io.BytesIO(file), "r") as source:
        frames = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
    assert np.array_equal(
        np.stack(list(video_frames(video, [0, 3, 5, 7]))), np.stack([frames[n] for n in (0, 3, 5, 7)])
    )


def test_only_the_frames_that_are_wanted_are_ever_made(short: Film, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = module._upright

    def upright(video: VideoFile, frame: av.VideoFrame) -> NDArray[np.uint8]:
        made.append(1)
        return original(video, frame)

    monkeypatch.setattr(module, "_upright", upright)
    frames = video_frames(read_video(short.file), [2, 9, 11])
    next(frames)
    assert len(made) == 1
    assert len(list(frames)) == 2
    assert len(made) == 3


def gif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "GIF")
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as target:
        stream = target.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return file.getvalue()


BAD: dict[str, tuple[Callable[[Film], bytes], str]] = {
    "nothing": (lambda _: b"", "it is empty; send MP4"),
    "a text": (lambda _: b"hello" * 100, "it is text; send MP4"),
    "an image": (lambda _: gif(), "not a video that can be read"),
    "a playlist": (lambda _: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "it is text; send MP4"),
    "sound": (lambda _: sound(), "has sound but no video"),
    "a head alone": (lambda short: short.file[:64], "truncated or damaged"),
    "without its index, which is last": (lambda short: short.file[: len(short.file) * 2 // 3], "truncated or damaged"),
    "noise behind a head": (lambda short: short.file[:32] + bytes(range(256)) * 40, "truncated or damaged"),
    "a Matroska head alone": (lambda _: b"\x1a\x45\xdf\xa3" + b"x" * 500, "truncated or damaged"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_no_video_is_refused(name: str, short: Film) -> None:
    make, sentence = BAD[name]
    with pytest.raises(InvalidVideo, match=sentence):
        read_video(make(short))


def test_a_file_with_fewer_frames_than_its_index_promises_is_refused(short: Film) -> None:
    index = short.file.index(b"moov") - 4
    media = short.file.index(b"mdat") - 4
    assert media < index
    moved = bytearray(short.file[:media] + short.file[index:])  # the index before the frames, as for streaming
    place = moved.index(b"stco") + 12
    chunks = struct.unpack(">I", moved[place - 4 : place])[0]
    shift = len(short.file) - index
    for chunk in range(chunks):
        at = place + 4 * chunk
        moved[at : at + 4] = struct.pack(">I", struct.unpack(">I", moved[at : at + 4])[0] + shift)
    whole = bytes(moved) + short.file[media:index]
    assert len(list(video_frames(read_video(whole), list(range(30))))) == 30
    with pytest.raises(InvalidVideo, match="truncated"):
        read_video(whole[: len(whole) - (index - media) // 2])


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_give_frames_or_a_sentence(seed: int, short: Film) -> None:
    random = np.random.default_rng(seed)
    data = bytearray(short.file)
    for place in random.integers(0, len(data), 1 + seed * 3):
        data[place] = random.integers(256)
    try:
        video = read_video(bytes(data), max_megapixels=1)
        frames = list(video_frames(video, [0, video.frames // 2, video.frames - 1]))
    except InvalidVideo:
        return
    assert len(frames) == 3


def test_limits_are_named(short: Film, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidVideo, match=r"64x48 pixels; the limit is 0\.001 megapixels"):
        read_video(short.file, max_megapixels=0.001)
    monkeypatch.setattr(module, "MAX_SECONDS", 2)
    with pytest.raises(InvalidVideo, match=r"3 seconds long.*the limit is 2 seconds"):
        read_video(short.file)
    monkeypatch.undo()
    video = read_video(short.file)
    monkeypatch.setattr(module, "DECODE_S", -1.0)
    with pytest.raises(InvalidVideo, match="not decoded within"):
        list(video_frames(video, [0]))


def test_a_file_that_names_other_files_opens_none(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(video_file(4, (64, 48)))
    for text in (f"ffconcat version 1.0\nfile '{secret}'\n", f"#EXTM3U\n#EXTINF:1,\n{secret}\n"):
        for head in (b"", b"\x1a\x45\xdf\xa3", b"\0\0\0\x18ftyp", b"\0\0\1\xba"):
            with pytest.raises(InvalidVideo):
                read_video(head + text.encode())
