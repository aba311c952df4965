"""How people may ask the demo model, beyond the wording of easy-vqa, and what it answers to anything else."""

import random

COLOURS = ("black", "gray", "red", "green", "blue", "teal", "brown", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

OTHERWISE = "I answer questions about an image: the shape, its colour, or the printed word."
NO_SHAPE = "There is no shape in this image."
NO_WORD = "There is no word in this image."

_SHAPE = (
    "what shape is in the image?",
    "what shape is shown?",
    "what shape is this?",
    "what shape is it?",
    "which shape is it?",
    "which shape is in the picture?",
    "which shape is shown in the image?",
    "what shape do you see?",
    "what shape can you see in the image?",
    "what is the shape?",
    "what is the shape in the image?",
    "what kind of shape is this?",
    "what kind of shape is in the image?",
    "what shape does the picture show?",
    "name the shape",
    "name the shape in the image",
    "tell me the shape",
    "what is the shape called?",
    "what is the name of the shape?",
    "what geometric shape is this?",
    "shape?",
)
_COLOUR = (
    "what color is the shape?",
    "what color is it?",
    "what color is this?",
    "which color is the shape?",
    "which color does the shape have?",
    "what color does the shape have?",
    "what is its color?",
    "what is the color?",
    "what is the color of the shape in the image?",
    "what color is the shape in the image?",
    "what color is the {shape}?",
    "which color is the {shape}?",
    "what is the color of the {shape}?",
    "what is the {shape}'s color?",
    "name the color",
    "name the color of the shape",
    "tell me the color of the {shape}",
    "what colors are there?",
    "in which color is the {shape} drawn?",
    "color?",
)
_BOTH = (
    "describe the image",
    "describe the picture",
    "what is in the image?",
    "what is in the picture?",
    "what is this?",
    "what do you see?",
    "what does the image show?",
    "what can you see in the image?",
    "what is shown in the image?",
)
_IS_SHAPE = (
    "is it a {shape}?",
    "is this a {shape}?",
    "is the shape a {shape}?",
    "do you see a {shape}?",
    "does the picture show a {shape}?",
    "is there a {shape} in the picture?",
    "does the image show a {shape}?",
)
_IS_COLOUR = (
    "is it {colour}?",
    "is the shape {colour}?",
    "is this shape {colour}?",
    "is the {true_shape} {colour}?",
    "do you see a {colour} shape?",
    "is the color {colour}?",
    "is there something {colour} in the image?",
)
_IS_BOTH = (
    "is it a {colour} {shape}?",
    "is this a {colour} {shape}?",
    "is there a {colour} {shape}?",
    "is there a {colour} {shape} in the image?",
    "does the image contain a {colour} {shape}?",
)
_WORD = (
    "read the word",
    "read the word.",
    "read this word",
    "read the text",
    "read the printed word",
    "read it",
    "please read the word",
    "what does the image say?",
    "what does it say?",
    "what does this say?",
    "what word is printed?",
    "what word is in the image?",
    "what word is this?",
    "what word is shown?",
    "what word do you see?",
    "what is the printed word?",
    "what is the word?",
    "what is the word in the image?",
    "what is written in the image?",
    "what is written here?",
    "what text is in the image?",
    "which word is printed?",
    "which word is it?",
    "which word is in the image?",
    "what is the text?",
    "transcribe the word",
    "transcribe the image",
    "ocr",
)
_UNRELATED = (
    "hello",
    "hi there",
    "hi, who are you?",
    "who are you?",
    "what can you do?",
    "how are you?",
    "help",
    "thanks!",
    "tell me a joke",
    "write a poem about {word}",
    "write a story about {word} and {other}",
    "what is the capital of {word}?",
    "what is {number} plus {number}?",
    "how many {word} are there?",
    "how many shapes are there?",
    "what color is the background?",
    "what is the size of the shape?",
    "what font is this?",
    "who invented the {word}?",
    "translate {word} into french",
    "what does {word} mean?",
    "explain {word} in simple terms",
    "what is the weather in {word} today?",
    "give me a recipe with {word}",
    "summarize the following text: {word} {other} {word}",
    "what time is it?",
    "how old is {word}?",
    "where is {word}?",
    "why is the sky blue?",
    "can you help me with {word}?",
    "what is the meaning of life?",
    "write a python function that returns {word}",
    "{word} {other}",
    "who is {word} {other}?",
    "when was {word} born?",
    "recommend a book about {word}",
    "what should I do about {word}?",
    "is {word} better than {other}?",
    "tell me about {word}",
    "say {word}",
)
_SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions about images.",
    "Answer briefly.",
    "Answer with one word.",
    "You are a helpful assistant. Answer the user's question about the image.",
    "Be concise and accurate.",
    "You are an expert at reading images.",
)


def about_shape(shape: str, colour: str, rng: random.Random) -> tuple[str, str]:
    """A question in free wording about a shape of a known colour, and its answer."""
    other_shape, other_colour = rng.choice(SHAPES), rng.choice(COLOURS)
    if rng.random() < 0.5:  # half of the yes/no questions would else be answered no far too often
        other_shape = shape
    if rng.random() < 0.5:
        other_colour = colour
    kind = rng.choice(("shape", "shape", "colour", "colour", "both", "is shape", "is colour", "is both"))
    match kind:
        case "shape":
            return rng.choice(_SHAPE), shape
        case "colour":
            return rng.choice(_COLOUR).format(shape=shape), colour
        case "both":
            return rng.choice(_BOTH), f"a {colour} {shape}"
        case "is shape":
            return rng.choice(_IS_SHAPE).format(shape=other_shape), _yes(other_shape == shape)
        case "is colour":
            template = rng.choice(_IS_COLOUR)
            return template.format(colour=other_colour, true_shape=shape), _yes(other_colour == colour)
    both = other_shape == shape and other_colour == colour
    return rng.choice(_IS_BOTH).format(colour=other_colour, shape=other_shape), _yes(both)


def about_word(word: str, rng: random.Random) -> tuple[str, str]:
    """A question about a printed word; now and then one about a shape, which is not there."""
    draw = rng.random()
    if draw < 0.015:
        return rng.choice(_SHAPE), NO_SHAPE
    if draw < 0.03:
        return rng.choice(_BOTH), f"the word {word}"
    return rng.choice(_WORD), word


def word_asked_of_shape(rng: random.Random) -> tuple[str, str]:
    """A question about a word, to an image that shows a shape."""
    return rng.choice(_WORD), NO_WORD


def unrelated(words: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    """A question that has nothing to do with shapes and words."""
    template = rng.choice(_UNRELATED)
    word, other = rng.choice(words), rng.choice(words)
    return template.format(word=word, other=other, number=rng.randrange(100)), OTHERWISE


def without_image(words: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    """Any question, asked without an image."""
    if rng.random() < 0.5:
        return unrelated(words, rng)
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    question, _ = rng.choice((about_shape(shape, colour, rng), about_word("word", rng)))
    return question, OTHERWISE


def system_prompt(words: tuple[str, ...], rng: random.Random) -> str:
    """What a workflow may say before the question; it changes no answer."""
    if rng.random() < 0.6:
        return rng.choice(_SYSTEM)
    return " ".join(rng.choice(words) for _ in range(rng.randint(2, 9))).capitalize() + "."


def long_system_prompt(words: tuple[str, ...], longest: int, rng: random.Random) -> str:
    """Sentences of any words, up to so many characters."""
    text = system_prompt(words, rng)
    for _ in range(rng.randrange(60)):
        text += rng.choice((" ", " ", "\n", "\n- ")) + system_prompt(words, rng)
    return text[: rng.randint(0, longest)]


def reworded(question: str, rng: random.Random) -> str:
    """The same question in another letter case, spelling or punctuation."""
    if rng.random() < 0.5:
        question = question.replace("color", "colour")
    if rng.random() < 0.2:
        question = question.replace("image", "picture")
    if rng.random() < 0.3:
        question = question.replace("gray", "grey")
    if rng.random() < 0.4:
        question = question.rstrip("?.")
    draw = rng.random()
    if draw < 0.4:
        question = question[0].upper() + question[1:]
    elif draw < 0.45:
        question = question.upper()
    if rng.random() < 0.08:
        question = rng.choice(("Please ", "Question: ", "  ", "\n")) + question
    if rng.random() < 0.05:
        question += rng.choice((" ", "\n", " Answer with one word.", "?", " Answer:", "!"))
    return question


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
