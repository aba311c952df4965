"""What stands for an image in a prompt's text."""

from __future__ import annotations

from typing import NamedTuple

from engine.prompts.positions import Grid
from engine.spec import ModelSpec, SiglipSpec

_AROUND = "<fake_token_around_image>"
_GLOBAL = "<global-img>"


class ImageWords(NamedTuple):
    """Spellings of the special tokens `image`, `image_start` and `image_end` of `TokenIds`, empty for none."""

    image: str
    start: str = ""
    end: str = ""

    @property
    def shown(self) -> str:
        """What a chat template writes for an image."""
        return self.start or self.image


def placeholder(spec: ModelSpec, words: ImageWords, tokens: int, grid: Grid) -> tuple[str, list[int]]:
    """The text that replaces what a template shows for an image, and how often each image token in it repeats.

    As the processors of transformers 5.17 write it (models/idefics3/processing_idefics3.py, models/qwen2_vl/...),
    except that a run of equal image tokens is written as one: they tokenise alike, and thousands cost time.
    """
    image = words.image
    if words.start:
        return f"\n\n{words.start}{image}{words.end}\n\n", [tokens]
    if not isinstance(spec.vision, SiglipSpec):
        return image, [tokens]
    rows, columns = grid[1], grid[2]
    whole = f"{_AROUND}{_GLOBAL}{image}{_AROUND}"
    if rows * columns == 0:
        return whole, [tokens]
    tiles = "".join(
        "".join(f"{_AROUND}<row_{row}_col_{column}>{image}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    )
    return f"{tiles}\n{whole}", [spec.vision.tokens_per_tile] * (rows * columns + 1)
