"""Messages and images to a prompt."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import CheckpointError, ContextOverflow, InvalidRequest
from engine.preprocess import ImageInput, Timing
from engine.prompts.answer import AnswerReader
from engine.prompts.detokenize import Detokenizer
from engine.prompts.placeholders import ImageWords, placeholder, video_placeholder
from engine.prompts.positions import Block, mrope_positions, text_positions
from engine.prompts.prompt import ImageSpan, Prompt
from engine.prompts.reasoning import opens
from engine.prompts.template import ChatTemplate
from engine.prompts.tokenizer import Tokenizer, special_tokens
from engine.prompts.tool_calls import ToolCallReader
from engine.request import Image, Message, Part, Text, Tool, Video, shown
from engine.spec import ModelSpec, QwenVisionSpec

# Unicode noncharacters: never text (Unicode 16, 23.7), so one that a request does not contain is always found.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_ALWAYS_COUNTED = 1 << 20  # characters; a longer text may be refused without counting its tokens


class PromptBuilder:
    """Thread-safe; one per model. Raises CheckpointError, naming the file, on construction.

    Text in messages never becomes a control or image token, whatever it spells: each spelling of a special token is
    cut in two for the tokenizer. Text without such spellings is tokenised in one piece with the template around it and
    gives exactly the tokens that transformers gives.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self._spec = spec
        self._template = ChatTemplate(folder, has_images=spec.vision is not None)
        self._words = self._find_image_words(folder)
        self._video_word = self._find_video_word()
        tokens = (spec.tokens.image, spec.tokens.video) if spec.vision else ()
        self._shown_tokens = [token for token in tokens if token is not None]
        self._bos = special_tokens(folder).get("bos_token")
        self._prefix = self.tokenizer.prefix() if spec.vision else []

    def build(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput],
        *,
        tools: Sequence[Tool] = (),
        thinking: bool | None = None,
    ) -> Prompt:
        """`images` are images and videos of the messages, in order; `thinking` as in ChatTemplate.render.

        Raises InvalidRequest.
        """
        ids, runs, opens_thinking = self._encode(messages, images, tools, thinking)
        is_image = np.isin(ids, self._shown_tokens)
        repeats = np.ones(len(ids), np.int64)
        repeats[is_image] = list(itertools.chain(*runs))
        starts = np.cumsum(repeats) - repeats
        ends = iter(zip(starts[is_image].tolist(), repeats[is_image].tolist(), strict=True))
        pieces = [list(itertools.islice(ends, len(run))) for run in runs]  # (start, length) of each image's
        spans = tuple(_span(piece, image.key) for piece, image in zip(pieces, images, strict=True))
        token_ids, is_image = np.repeat(ids, repeats), np.repeat(is_image, repeats)
        positions, delta = self._positions(len(token_ids), pieces, images)
        return Prompt(
            token_ids=token_ids,
            feature_index=np.where(is_image, np.cumsum(is_image) - 1, -1),
            positions=positions,
            position_delta=delta,
            image_spans=spans,
            whole_images=self._spec.decoder.mutual_images,
            image_tokens=int(is_image.sum()),
            opens_thinking=opens_thinking,
        )

    def count(self, messages: Sequence[Message], images: Sequence[ImageInput], tools: Sequence[Tool] = ()) -> int:
        """Tokens of the prompt that `build` would make. Raises InvalidRequest."""
        ids, runs, _ = self._encode(messages, images, tools)
        return len(ids) + sum(repeat - 1 for run in runs for repeat in run)

    def detokenizer(self) -> Detokenizer:
        """For one sequence's output."""
        return Detokenizer(self.tokenizer)

    def reader(self, tools: Sequence[Tool], *, opens_thinking: bool) -> AnswerReader | None:
        """For one stream's events; None when they are shown as they are."""
        form = self._template.tool_format
        calls = ToolCallReader(form, tools, thinking=opens_thinking) if tools and form else None
        return AnswerReader(opens_thinking=opens_thinking, calls=calls) if calls or opens_thinking else None

    def _encode(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput],
        tools: Sequence[Tool] = (),
        thinking: bool | None = None,
    ) -> tuple[NDArray[np.int64], list[list[int]], bool]:
        """Token ids with each run of image tokens as one, for each image the lengths of its runs, `opens_thinking`."""
        parts = shown(messages)
        if (parts or images) and self._words is None:
            raise InvalidRequest(_TEXT_ONLY)
        if any(isinstance(part, Video) for part in parts) and self._video_word is None:
            raise InvalidRequest(NO_VIDEOS)
        if [isinstance(part, Video) for part in parts] != [image.timing is not None for image in images]:
            raise InvalidRequest(f"the messages show {len(parts)} images, but {len(images)} were given")
        said = list(_texts(messages, tools))
        self._refuse_hopeless(said)
        mark = _unused_mark(said)
        cut = partial(self._cut_spellings, mark=mark)
        rendered = self._template.render(
            [self._cut_control(message, mark) for message in messages],
            [
                replace(tool, description=cut(tool.description), parameters=_cut_json(tool.parameters, cut))
                for tool in tools
            ],
            thinking,
        )
        text, runs = self._place_images(rendered, images)
        pieces = [self.tokenizer.encode(piece) for piece in text.split(mark)]
        prefix = [] if self._bos and rendered.startswith(self._bos) else self._prefix
        ids = np.array([*prefix, *itertools.chain(*pieces)], np.int64)
        expected = sum(map(len, runs))
        if int(np.isin(ids, self._shown_tokens).sum()) != expected:
            raise InvalidRequest("a message contains a spelling of the model's image token; remove it")
        return ids, runs, opens(rendered)

    def _refuse_hopeless(self, texts: Sequence[str]) -> None:
        """Tokenising a hundred megabytes takes minutes and gigabytes, only to find that they do not fit.

        Twice the longest token leaves room for tokenizers that shorten text before they cut it (Unicode's NFC).
        """
        context = self._spec.decoder.context_length
        most = max(_ALWAYS_COUNTED, 2 * self.tokenizer.longest * context)
        if (length := sum(map(len, texts))) > most:
            raise ContextOverflow(
                f"the prompt is {length} characters; the context of {context} tokens cannot hold them."
                " Shorten the prompt"
            )

    def _place_images(self, rendered: str, images: Sequence[ImageInput]) -> tuple[str, list[list[int]]]:
        if self._words is None:
            return rendered, []
        words = [word for word in (self._words.shown, self._video_word) if word]
        texts = re.split("|".join(map(re.escape, words)), rendered)
        if len(texts) - 1 != len(images):
            raise InvalidRequest(
                f"this model's chat template shows {len(texts) - 1} of {len(images)} images; put them in user messages"
            )
        placed = [self._placeholder(self._words, image) for image in images]
        joined = "".join(itertools.chain(*zip(texts, [text for text, _ in placed], strict=False))) + texts[-1]
        return joined, [runs for _, runs in placed]

    def _placeholder(self, words: ImageWords, image: ImageInput) -> tuple[str, list[int]]:
        if image.timing is None:
            return placeholder(self._spec, words, image)
        assert self._video_word is not None, "This is a bug: a video that this model cannot read."
        assert isinstance(self._spec.vision, QwenVisionSpec)
        return video_placeholder(self._spec.vision, self._video_word, image)

    def _cut_control(self, message: Message, mark: str) -> Message:
        """Put the mark inside every spelling of a special token, also of one spread over neighbouring texts."""
        parts: list[Part] = []
        for is_text, run in itertools.groupby(message.parts, lambda part: isinstance(part, Text)):
            if not is_text:
                parts += run
                continue
            texts = [_valid_unicode(part.text) for part in run if isinstance(part, Text)]
            joined = "".join(texts)
            if (cut := self._cut_spellings(joined, mark)) != joined:
                texts = [cut]
            parts += map(Text, texts)
        calls = [
            replace(call, arguments=_cut_json(call.arguments, partial(self._cut_spellings, mark=mark)))
            for call in message.tool_calls
        ]
        return replace(message, parts=tuple(parts), tool_calls=tuple(calls))

    def _cut_spellings(self, text: str, mark: str) -> str:
        starts = self.tokenizer.control_starts(text)
        return mark.join(_cut(text, [start + 1 for start in starts])) if starts else text

    def _positions(
        self, length: int, pieces: Sequence[Sequence[tuple[int, int]]], images: Sequence[ImageInput]
    ) -> tuple[NDArray[np.int64], int]:
        axes, vision = self._spec.decoder.rope.axes, self._spec.vision
        if axes == 1 or not isinstance(vision, QwenVisionSpec):
            return text_positions(length, axes), 0
        blocks = []
        for piece, image in zip(pieces, images, strict=True):
            frames, rows, columns = image.grid
            grid = (frames // len(piece), rows // vision.merge, columns // vision.merge)
            blocks += [Block(start, grid, _temporal_step(vision, image.timing)) for start, _ in piece]
        return mrope_positions(length, blocks)

    def _find_image_words(self, folder: Path) -> ImageWords | None:
        if self._spec.vision is None:
            return None
        tokens = self._spec.tokens
        around = (tokens.image_start, tokens.image_end)
        words = ImageWords(
            self._special(tokens.image, folder), *(self._special(t, folder) for t in around if t is not None)
        )
        shown = self._template.render([Message("user", (Image(b""), Text("?")))]).count(words.shown)
        if shown != 1:
            raise CheckpointError(f"the chat template in {folder} writes {words.shown} {shown} times for one image")
        return words

    def _find_video_word(self) -> str | None:
        """None for a model that cannot be shown videos, because of its family or of its chat template."""
        token = self._spec.tokens.video
        word = None if token is None else self.tokenizer.token(token)
        if token is None or word is None or not self.tokenizer.is_special(token) or not self._template.shows_videos:
            return None
        return word if self._template.render([Message("user", (Video(b""), Text("?")))]).count(word) == 1 else None

    def _special(self, token: int | None, folder: Path) -> str:
        text = None if token is None else self.tokenizer.token(token)
        if token is None or text is None or not self.tokenizer.is_special(token):
            raise CheckpointError(
                f"config.json's image token {token} is no special token of {folder / 'tokenizer.json'}"
            )
        return text


NO_VIDEOS = "this model reads no videos; remove the video, or choose a model with video"
_TEXT_ONLY = "this model reads text only; remove the images or choose a model with vision"


def _span(runs: list[tuple[int, int]], key: bytes) -> ImageSpan:
    """From the first run's start to the last run's end, of (start, length) runs."""
    return ImageSpan(runs[0][0], runs[-1][0] + runs[-1][1], key)


def _temporal_step(spec: QwenVisionSpec, timing: Timing | None) -> int:
    """How far the frames of a video are apart: as Qwen2.5-VL counts, in whole seconds of float32."""
    if timing is None or not spec.positions_per_second:
        return 1
    return spec.positions_per_second * int(np.float32(timing.interval))


def _texts(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[str]:
    for message in messages:
        yield from (part.text for part in message.parts if isinstance(part, Text))
        yield from (call.arguments for call in message.tool_calls)
    for tool in tools:
        yield from (tool.description, tool.parameters)


def _cut_json(text: str, cut: Callable[[str], str]) -> str:
    """A JSON text with every string of it cut, keys too."""

    def within(value: Any) -> Any:
        match value:
            case str():
                return cut(_valid_unicode(value))
            case dict():
                return {within(key): within(one) for key, one in value.items()}
            case list():
                return [within(one) for one in value]
        return value

    return json.dumps(within(json.loads(text)), ensure_ascii=False)


def _unused_mark(texts: Sequence[str]) -> str:
    used = set().union(*texts) & set(_MARKS)
    if len(used) == len(_MARKS):
        raise InvalidRequest("a message contains all of Unicode's noncharacters U+FDD0 to U+FDEF; remove one")
    return next(mark for mark in _MARKS if mark not in used)


def _cut(text: str, places: Sequence[int]) -> list[str]:
    return [text[start:stop] for start, stop in itertools.pairwise((0, *places, len(text)))]


def _valid_unicode(text: str) -> str:
    """Surrogates joined to characters; lone ones, which no tokenizer takes, replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
