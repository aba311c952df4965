"""Fonts that tell letters apart, and images that are what they claim to be."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont, JpegImagePlugin

from evaluation import fonts, printed_words


def test_fonts_whose_letters_look_alike_are_left_out() -> None:
    """Bebas prints small letters as capitals; the I and l of these Sansation and Walkway fonts are one stroke."""
    usable = {font.stem for font in fonts.usable_fonts()}
    assert not usable & {"BEBAS___", "SEASRN__", "Sansation-Regular", "Walkway_Black", "Capture_it", "Amatic-Bold"}
    assert usable >= {"Roboto-Regular", "OpenSans-Bold", "Lato-Italic", "DroidSans", "Pacifico"}


def test_evaluation_prints_in_many_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()

    def seen(font: Path, line_height: int) -> ImageFont.FreeTypeFont:
        used.add(font.stem)
        return fonts.face_for_line(font, line_height)

    monkeypatch.setattr(printed_words, "face_for_line", seen)
    list(printed_words.test_samples(300, seed=0))
    assert len(used) >= 50


def test_two_glyphs_that_are_the_same_differ_in_nothing() -> None:
    glyph = np.zeros((8, 16), dtype=np.float32)
    glyph[2:6, 7:9] = 1
    wider = glyph.copy()
    wider[2:6, 9] = 1
    assert fonts.least_difference([glyph, glyph]) == 0
    assert fonts.least_difference([glyph, wider]) == pytest.approx(1 / 3)
    assert fonts.least_difference([glyph, np.zeros_like(glyph)]) == 0, "a font without the letter"


def test_the_line_box_has_the_height_asked_for() -> None:
    for font in fonts.usable_fonts():
        for height in (16, 40):
            assert abs(sum(fonts.face_for_line(font, height).getmetrics()) - height) <= 2


def test_the_same_seed_gives_the_same_files() -> None:
    first, again = (list(printed_words.test_samples(20, seed=5)) for _ in range(2))
    assert first == again
    assert first != list(printed_words.test_samples(20, seed=6))


def test_every_image_is_a_small_jpeg_of_one_readable_word() -> None:
    for sample in printed_words.test_samples(100, seed=1):
        image = Image.open(io.BytesIO(sample.image))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert 16 <= image.height <= 90
        assert sample.answer.isascii()
        assert sample.answer.isalpha()
        assert sample.question in printed_words.QUESTIONS


def test_jpeg_quality_is_what_the_module_states() -> None:
    sample = next(iter(printed_words.test_samples(1)))
    written = io.BytesIO()
    Image.new("RGB", (8, 8)).save(written, "JPEG", quality=70)
    files = [JpegImagePlugin.JpegImageFile(io.BytesIO(data)) for data in (sample.image, written.getvalue())]
    assert files[0].quantization == files[1].quantization


def test_styles_stay_within_what_is_promised() -> None:
    rng = random.Random(3)
    styles = [printed_words.random_print(rng) for _ in range(500)]
    assert {style.line_height for style in styles} == set(range(16, 41))
    assert all(abs(style.tilt) <= 3 for style in styles)
    assert {style.background for style in styles} == {"plain", "gradient", "noise", "texture"}
    for style in styles:
        assert abs(printed_words._luma(style.ink) - printed_words._luma(style.paper)) >= printed_words.LEAST_CONTRAST


@pytest.mark.parametrize("word", ["flag", "Jpyqj", "WWWWWWWWWWWW"])
def test_no_ink_is_cut_off(word: str) -> None:
    """The border of the mask stays empty when there is room for the tilt."""
    rng = random.Random(4)
    for font in fonts.usable_fonts():
        style = printed_words.Print(font, 40, (0, 0, 0), (255, 255, 255), "plain", 3.0, (0.3, 0.2, 0.3, 0.2))
        mask = np.asarray(printed_words.ink_mask(word, style))
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert border.max() < 16, font.stem
        assert mask.max() > 128
        assert printed_words.printed(word, style, rng).size == mask.shape[::-1]
