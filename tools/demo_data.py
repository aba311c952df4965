"""Training batches of the demo model: conversations about images, as token ids and pixels.

Only the training sides of the data sets are read here: easy-vqa's train folder, the dictionary's train words, random
letters whose hash is on the train side.
"""

import io
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from evaluation import easy_vqa, printed_words
from evaluation.fonts import usable_fonts
from evaluation.words import LONGEST, SHORTEST, in_some_case, split_of, words
from tools import demo_questions as asks
from tools.demo_model import AROUND_IMAGE, END, IMAGE, IMAGE_TOKENS, PAD, START, TILE, WHOLE_IMAGE
from tools.demo_shapes import random_shape

LENGTHS = {1: 176, 2: 352, 6: 2048}
"""Tokens of a sequence with at most so many images. The last leaves room for a long system prompt."""
IMAGE_IDS = [AROUND_IMAGE, WHOLE_IMAGE, *[IMAGE] * IMAGE_TOKENS, AROUND_IMAGE]
ASSISTANT = [*b"Assistant: "]


@dataclass(slots=True)
class Conversation:
    """Token ids and, for each, whether the model is to learn it; the images in the order of their tokens."""

    ids: list[int] = field(default_factory=lambda: [START])
    learned: list[bool] = field(default_factory=lambda: [False])
    tiles: list[Image.Image] = field(default_factory=list)

    def say(self, ids: list[int], learned: bool = False) -> None:
        self.ids += ids
        self.learned += [learned] * len(ids)

    def system(self, text: str) -> None:
        self.say([*b"System: ", *text.encode(), END, 10])

    def turn(self, question: str, answer: str, tile: Image.Image | None = None, image_first: bool = True) -> None:
        """One question, with its image before or after the text, and the answer."""
        text = [*question.encode()]
        if tile is None:
            self.say([*b"User: ", *text])
        else:
            self.tiles.append(tile)
            self.say([*b"User:", *IMAGE_IDS, *text] if image_first else [*b"User: ", *text, *IMAGE_IDS])
        self.say([END, 10, *ASSISTANT])
        self.say([*answer.encode(), END], learned=True)
        self.say([10])


@dataclass(frozen=True, slots=True)
class Pictured:
    """A tile and the questions that may be asked about it, drawn one after another."""

    tile: Image.Image
    questions: Iterator[tuple[str, str]]
    more: float
    """How likely a further question is; low for words, whose second answer could be copied from the first."""


class DemoBatches(IterableDataset[dict[str, torch.Tensor]]):
    """Endless batches; every worker draws its own. Two batches in sixteen hold conversations with two images, one has
    long conversations with up to six.

    A batch: `pixels` uint8 [images, TILE, TILE, 3]; `ids`, `labels` (-100 where nothing is learned) int64
    [sequences, tokens]; `places` int64 [images * IMAGE_TOKENS], the token that each image feature replaces, counted
    over all sequences, or their number of tokens for the features of unused images.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"demo batches {self.seed} {worker.id if worker else 0}")
        while True:
            images, sequences = rng.choices(((1, 1), (2, 2), (6, 16)), (13, 2, 1))[0]
            talks = [conversation(rng, images) for _ in range(self.images // sequences)]
            yield collated(talks, LENGTHS[images], self.images)


def conversation(rng: random.Random, images: int) -> Conversation:
    """A conversation about at most `images` images that fits the length for as many."""
    room = LENGTHS[images]
    talk = Conversation()
    if images > 2:
        images = rng.randint(1, images)
        talk.system(asks.long_system_prompt(words("train"), room - 200 * images - 100, rng))
    elif rng.random() < 0.15 * images:
        talk.system(asks.system_prompt(words("train"), rng)[: 40 * images])
    if rng.random() < 0.04:
        talk.turn(*_reworded(asks.without_image(words("train"), rng), rng))
        return _cut(talk, room)
    for _ in range(images):
        pictured = random_picture(rng)
        question = _reworded(next(pictured.questions), rng)
        if rng.random() < 0.02:
            question = _reworded(asks.unrelated(words("train"), rng), rng)
        talk.turn(*question, tile=pictured.tile, image_first=rng.random() < 0.6)
        while rng.random() < pictured.more:
            question = _reworded(next(pictured.questions), rng)
            if len(talk.ids) + len("".join(question)) + 24 > room - (images - len(talk.tiles)) * 130:
                break
            talk.turn(*question)
    return _cut(talk, room)


def random_picture(rng: random.Random) -> Pictured:
    """Mostly printed words, else shapes of easy-vqa's train folder or drawn anew."""
    draw = rng.random()
    if draw < 0.7:
        return printed_word(rng)
    if draw < 0.9:
        return easy_vqa_shape(rng)
    image, shape, colour = random_shape(rng)
    return Pictured(tile(_aged(image, rng)), _shape_questions(shape, colour, rng), more=0.6)


def printed_word(rng: random.Random) -> Pictured:
    """A word that evaluation never asks for, or random letters; a little more varied than evaluation's."""
    text = in_some_case(training_word(rng), rng)
    style = printed_words.random_print(rng, rng.choices(((14, 24), (16, 42), (42, 64)), (0.3, 0.63, 0.07))[0])
    if rng.random() < 0.08 and style.line_height > 20:
        left, top, right, bottom = (rng.uniform(0, 2.5) for _ in range(4))
        style = replace(style, margins=(left, top, right, bottom))
    image = printed_words.printed(text, style, rng)
    quality = rng.choice((printed_words.QUALITY, printed_words.QUALITY, rng.randint(60, 95)))
    aged = Image.open(io.BytesIO(printed_words.encoded(image, quality)))
    return Pictured(tile(aged), _endless(lambda: asks.about_word(text, rng)), more=0.1)


def training_word(rng: random.Random) -> str:
    """A word of the train side, in lower case: three in four from the dictionary, the rest random letters."""
    if rng.random() < 0.75:
        return rng.choice(words("train"))
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(SHORTEST, LONGEST)))
        if split_of(word) == "train":
            return word


def easy_vqa_shape(rng: random.Random) -> Pictured:
    """An image of easy-vqa's train folder with the data set's own questions, and others where the facts are known."""
    image_id = rng.randrange(len(_easy_vqa_by_image()))
    own, facts = _easy_vqa_by_image()[image_id], _easy_vqa_facts()[image_id]
    image = Image.open(io.BytesIO(easy_vqa.image_file("train", image_id))).convert("RGB")

    def draw() -> tuple[str, str]:
        if facts is None or rng.random() < 0.75:
            return rng.choice(own)
        return asks.word_asked_of_shape(rng) if rng.random() < 0.06 else asks.about_shape(*facts, rng)

    return Pictured(tile(_aged(image, rng)), _endless(draw), more=0.6)


def tile(image: Image.Image) -> Image.Image:
    """The square that the model sees, made the way transformers' Idefics3ImageProcessorPil makes it."""
    width, height = image.size
    if width >= height:
        size = (TILE, max(1, _even(int(TILE / (width / height)))))
    else:
        size = (max(1, _even(int(TILE * (width / height)))), TILE)
    resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return resized.resize((TILE, TILE), Image.Resampling.LANCZOS)


def collated(talks: list[Conversation], length: int, images: int) -> dict[str, torch.Tensor]:
    """The batch of these conversations; images that none uses stay black."""
    ids = np.full((len(talks), length), PAD, dtype=np.int64)
    labels = np.full((len(talks), length), -100, dtype=np.int64)
    places = np.full(images * IMAGE_TOKENS, ids.size, dtype=np.int64)
    pixels = np.zeros((images, TILE, TILE, 3), dtype=np.uint8)
    used = 0
    for row, talk in enumerate(talks):
        tokens = np.asarray(talk.ids)
        ids[row, : len(tokens)] = tokens
        learned = np.asarray(talk.learned[1:])
        labels[row, : len(tokens) - 1][learned] = tokens[1:][learned]
        at = np.flatnonzero(tokens == IMAGE) + row * length
        places[used * IMAGE_TOKENS : used * IMAGE_TOKENS + len(at)] = at
        for picture in talk.tiles:
            pixels[used] = np.asarray(picture)
            used += 1
    arrays = {"pixels": pixels, "ids": ids, "labels": labels, "places": places}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def warm_caches() -> None:
    """Reads dictionaries, questions and fonts once, for worker processes to inherit."""
    usable_fonts()
    words("train")
    _easy_vqa_facts()


def _cut(talk: Conversation, room: int) -> Conversation:
    """The first `room` tokens; what is cut is the end of an answer, never an image."""
    talk.ids, talk.learned = talk.ids[:room], talk.learned[:room]
    if talk.ids.count(IMAGE) != len(talk.tiles) * IMAGE_TOKENS:
        raise ValueError("a conversation is too long for its images")
    return talk


def _aged(image: Image.Image, rng: random.Random) -> Image.Image:
    """The same shape mirrored, resized or saved as JPEG, or left as it is."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.25:
        side = rng.randint(48, 160)
        image = image.resize((side, side), rng.choice((Image.Resampling.BILINEAR, Image.Resampling.NEAREST)))
    if rng.random() < 0.35:
        image = Image.open(io.BytesIO(printed_words.encoded(image, rng.randint(60, 95))))
    return image


def _shape_questions(shape: str, colour: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    return _endless(lambda: asks.about_shape(shape, colour, rng))


def _endless(draw: Callable[[], tuple[str, str]]) -> Iterator[tuple[str, str]]:
    while True:
        yield draw()


def _reworded(asked: tuple[str, str], rng: random.Random) -> tuple[str, str]:
    question, answer = asked
    return (question, answer) if rng.random() < 0.4 else (asks.reworded(question, rng), answer)


def _even(length: int) -> int:
    return length + length % 2


@cache
def _easy_vqa_by_image() -> dict[int, list[tuple[str, str]]]:
    by_image: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image_id in easy_vqa.questions("train"):
        by_image.setdefault(image_id, []).append((question, answer))
    return by_image


@cache
def _easy_vqa_facts() -> dict[int, tuple[str, str] | None]:
    """Shape and colour of each train image, where its questions tell both."""
    return {image_id: _facts(asked) for image_id, asked in _easy_vqa_by_image().items()}


def _facts(asked: list[tuple[str, str]]) -> tuple[str, str] | None:
    told: set[str] = set()
    for question, answer in asked:
        named = set(question.rstrip("?").split()) & {*asks.SHAPES, *asks.COLOURS}
        negated = " not " in question or " no " in question
        if answer not in ("yes", "no"):
            told |= {answer} | named
        elif (answer == "yes") != negated:
            told |= named
    shapes, colours = told & {*asks.SHAPES}, told & {*asks.COLOURS}
    return (shapes.pop(), colours.pop()) if len(shapes) == len(colours) == 1 else None
