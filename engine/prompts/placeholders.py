"""What stands for an image or a video in a prompt's text."""

from __future__ import annotations

from typing import NamedTuple

from engine.preprocess import ImageInput
from engine.spec import ModelSpec, QwenVisionSpec, SiglipSpec

_AROUND = "<fake_token_around_image>"
_GLOBAL = "<global-img>"
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"


class ImageWords(NamedTuple):
    """Spellings of the special tokens `image`, `image_start` and `image_end` of `TokenIds`, empty for none."""

    image: str
    start: str = ""
    end: str = ""

    @property
    def shown(self) -> str:
        """What a chat template writes for an image."""
        return self.start or self.image


def video_placeholder(spec: QwenVisionSpec, word: str, video: ImageInput) -> tuple[str, list[int]]:
    """As `placeholder` for a video: `word` stands for it, or for what was seen at each of its times.

    What a template writes around a video stays around all of them (models/qwen3_vl/processing_qwen3_vl.py).
    """
    assert video.timing is not None, "This is a bug: an image where a video is."
    if not spec.timestamps:
        return word, [video.tokens]
    seconds = video.timing.seconds
    text = "".join(f"<{second:.1f} seconds>{_VISION_START}{word}{_VISION_END}" for second in seconds)
    return text, [video.tokens // len(seconds)] * len(seconds)


def placeholder(spec: ModelSpec, words: ImageWords, shown: ImageInput) -> tuple[str, list[int]]:
    """The text that replaces what a template shows for an image, and how often each image token in it repeats.

    As the processors of transformers 5.17 write it (models/idefics3/processing_idefics3.py, models/qwen2_vl/...),
    except that a run of equal image tokens is written as one: they tokenise alike, and thousands cost time.
    """
    image, tokens = words.image, shown.tokens
    if words.start:
        return f"\n\n{words.start}{image}{words.end}\n\n", [tokens]
    if not isinstance(spec.vision, SiglipSpec):
        return image, [tokens]
    rows, columns = shown.grid[1], shown.grid[2]
    whole = f"{_AROUND}{_GLOBAL}{image}{_AROUND}"
    if rows * columns == 0:
        return whole, [tokens]
    tiles = "".join(
        "".join(f"{_AROUND}<row_{row}_col_{column}>{image}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    )
    return f"{tiles}\n{whole}", [spec.vision.tokens_per_tile] * (rows * columns + 1)
