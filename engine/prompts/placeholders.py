"""What stands for an image in a prompt's text."""

from __future__ import annotations

from engine.prompts.positions import Grid
from engine.spec import ModelSpec, SiglipSpec

_AROUND = "<fake_token_around_image>"
_GLOBAL = "<global-img>"


def placeholder(spec: ModelSpec, image_token: str, tokens: int, grid: Grid) -> tuple[str, list[int]]:
    """The text that replaces a template's image token, and how often each image token in it repeats.

    As the processors of transformers 5.17 write it (models/idefics3/processing_idefics3.py, models/qwen2_vl/...),
    except that a run of equal image tokens is written as one: they tokenise alike, and thousands cost time.
    """
    if not isinstance(spec.vision, SiglipSpec):
        return image_token, [tokens]
    rows, columns = grid[1], grid[2]
    whole = f"{_AROUND}{_GLOBAL}{image_token}{_AROUND}"
    if rows * columns == 0:
        return whole, [tokens]
    tiles = "".join(
        "".join(f"{_AROUND}<row_{row}_col_{column}>{image_token}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    )
    return f"{tiles}\n{whole}", [spec.vision.tokens_per_tile] * (rows * columns + 1)
