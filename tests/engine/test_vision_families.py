"""Questions about images, from their files to the answer's text, are answered as transformers answers them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Picture
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from engine.errors import ContextOverflow
from engine.request import Image, Message, Part, Request, SamplingParams, Text, Video
from tests.engine.asking import ask, picture, request
from tests.engine.conftest import Start, tiny_gemma3
from tests.preprocess.films import Film, film
from tests.prompts import checkpoints
from tests.prompts.checkpoints import Reference, question
from tests.runtime.models import randomise

TOKENS = 16
QUESTIONS: list[tuple[list[tuple[int, int]], str]] = [
    ([(57, 131)], "What shape is in the image?"),
    ([(230, 61), (64, 64)], "again and again"),
    ([], "Answer in one word."),
    ([(64, 64), (301, 97), (29, 200)], "What?"),
]


@dataclass(frozen=True)
class Tiny:
    reference: Reference
    model: PreTrainedModel

    def answer(self, files: list[bytes], text: str) -> str:
        """Greedy, TOKENS long."""
        pictures: list[Picture.Image] = [Picture.open(io.BytesIO(file)) for file in files]
        return self._answer(self.reference.inputs([question(*pictures, text)], pictures))

    def answer_about(self, parts: Sequence[str | bytes | Film]) -> str:
        """With videos among images and texts."""
        shown = [Picture.open(io.BytesIO(part)) if isinstance(part, bytes) else part for part in parts]
        pictures = [part for part in shown if isinstance(part, Picture.Image)]
        films = [part for part in shown if isinstance(part, Film)]
        return self._answer(self.reference.inputs([message(parts)], pictures, films))

    def _answer(self, given: Any) -> str:
        inputs = {name: torch.as_tensor(value) for name, value in given.items()}
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)  # type: ignore[operator]
        tokens = out[0, inputs["input_ids"].shape[1] :]
        answer: str = self.reference.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return answer


def _config(reference: Reference, config: Any, rope: dict[str, Any], tower: dict[str, Any], **text: Any) -> Any:
    tokenizer = reference.processor.tokenizer
    return config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | rope,
            **text,
        },
        vision_config={"depth": 3, "hidden_size": 72, "out_hidden_size": 64, "num_heads": 3} | tower,
        image_token_id=reference.spec.tokens.image,
        video_token_id=reference.spec.tokens.video,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )


def message(parts: Sequence[str | bytes | Film]) -> Message:
    kinds: list[Part] = []
    for part in parts:
        match part:
            case str():
                kinds.append(Text(part))
            case bytes():
                kinds.append(Image(part))
            case Film():
                kinds.append(Video(part.file))
    return Message("user", tuple(kinds))


def qwen2_vl(folder: Path) -> Tiny:
    reference = checkpoints.qwen2_vl(folder)
    tower = {"embed_dim": 72, "hidden_size": 64, "mlp_ratio": 2}
    config = _config(reference, Qwen2VLConfig, {"mrope_section": [2, 3, 3]}, tower)
    return Tiny(reference, Qwen2VLForConditionalGeneration(config))  # type: ignore[no-untyped-call]


def qwen2_5_vl(folder: Path) -> Tiny:
    reference = checkpoints.qwen2_vl(folder)
    reference.processor.__class__ = Qwen2_5_VLProcessor  # of the same parts, and it says how long frames are apart
    tower = {"intermediate_size": 60, "fullatt_block_indexes": [1], "tokens_per_second": 3}
    config = _config(reference, Qwen2_5_VLConfig, {"mrope_section": [2, 3, 3]}, tower)
    return Tiny(reference, Qwen2_5_VLForConditionalGeneration(config))  # type: ignore[no-untyped-call]


def qwen3_vl(folder: Path) -> Tiny:
    reference = checkpoints.qwen3_vl(folder)
    rope = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    tower = {"intermediate_size": 80, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
    config = _config(reference, Qwen3VLConfig, rope, tower, head_dim=16)
    return Tiny(reference, Qwen3VLForConditionalGeneration(config))  # type: ignore[no-untyped-call]


def qwen3_5(folder: Path) -> Tiny:
    """Four layers, of which the last attends; a quarter of a head turns."""
    reference = checkpoints.qwen3_vl(folder)
    rope = {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_value_heads": 4}
    tower = {"intermediate_size": 80, "num_position_embeddings": 36}
    text = {"head_dim": 32, "num_hidden_layers": 4, "linear_num_key_heads": 2} | linear
    config = _config(reference, Qwen3_5Config, rope, tower, **text)
    return Tiny(reference, Qwen3_5ForConditionalGeneration(config))  # type: ignore[no-untyped-call]


def gemma3(folder: Path) -> Tiny:
    reference = checkpoints.gemma3(folder)
    return Tiny(reference, tiny_gemma3(reference))


MODELS: dict[str, Callable[[Path], Tiny]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "gemma3": gemma3,
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


_MADE: dict[str, Tiny] = {}


def make(name: str, storage: Path) -> Tiny:
    if name not in _MADE:
        made = _MADE[name] = MODELS[name](storage / "models" / name)
        randomise(made.model).save_pretrained(made.reference.folder)
    return _MADE[name]


@pytest.fixture(
    scope="module", params=[name for name in MODELS if name != "qwen2_vl"]
)  # conftest's other tests have it
def tiny(request: pytest.FixtureRequest, storage: Path) -> Tiny:
    return make(request.param, storage)


@pytest.fixture(scope="module", params=[name for name in MODELS if name.startswith("qwen")])
def tiny_with_video(request: pytest.FixtureRequest, storage: Path) -> Tiny:
    return make(request.param, storage)


def test_answers_about_images_of_odd_sizes_are_transformers(tiny: Tiny, start: Start) -> None:
    asked = [
        ([picture(7 * number + n, size) for n, size in enumerate(sizes)], text)
        for number, (sizes, text) in enumerate(QUESTIONS)
    ]
    wanted = [tiny.answer(files, text) for files, text in asked]
    options: dict[str, Any] = {"model": tiny.reference.folder.name, "max_tokens": TOKENS, "ignore_eos": True}
    for chunk in (0, 40):
        engine = start(precision="fp32", prefill_chunk=chunk)
        for _ in range(3):  # the second time prefixes are there already, states of linear attention the third
            answers = [ask(engine, request(*files, text, **options)) for files, text in asked]
            assert [answer.wait().text for answer in answers] == wanted
        assert answers[-1].finished is not None
        assert answers[-1].finished.usage.reused_tokens > 0


def test_a_video_of_minutes_is_continued_at_its_own_positions(storage: Path, start: Start) -> None:
    """Beyond its tokens. The reference computes every token anew: transformers' `generate` forgets the seconds."""
    tiny, slow = make("qwen2_5_vl", storage), film(6, (64, 64), fps=0.05)
    inputs = tiny.reference.inputs([message([slow, "What?"])], [], [slow])
    prompt: torch.Tensor = inputs.pop("input_ids")
    kinds = inputs.pop("mm_token_type_ids")
    grid = {name: inputs[name] for name in ("video_grid_thw", "second_per_grid_ts")}
    model: Any = tiny.model
    del inputs["attention_mask"]
    positions, delta = model.model.get_rope_index(prompt, kinds, **grid)
    assert delta > 100
    tokens = prompt
    with torch.no_grad():
        for place in range(prompt.shape[1], prompt.shape[1] + TOKENS):
            logits = model(input_ids=tokens, mm_token_type_ids=kinds, position_ids=positions, use_cache=False, **inputs)
            tokens = torch.cat([tokens, logits.logits[:, -1:].argmax(-1)], 1)
            kinds = torch.cat([kinds, kinds.new_zeros(1, 1)], 1)
            positions = torch.cat([positions, torch.full((3, 1, 1), place + int(delta))], 2)
    wanted = tiny.reference.processor.tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    answer = ask(start(precision="fp32"), Request("qwen2_5_vl", (message([slow, "What?"]),), sampling))
    assert answer.wait().text == wanted


def test_a_video_whose_seconds_reach_beyond_the_context_is_refused(storage: Path, start: Start) -> None:
    make("qwen2_5_vl", storage)
    slow = film(6, (64, 64), fps=0.005)
    answer = ask(start(precision="fp32"), Request("qwen2_5_vl", (message([slow, "What?"]),), SamplingParams())).wait()
    assert isinstance(answer.error, ContextOverflow)


def test_answers_about_videos_are_transformers(tiny_with_video: Tiny, start: Start) -> None:
    """Alone, among images, two of them, in an odd number of frames, larger and smaller than they may be, and again."""
    tiny, name = tiny_with_video, tiny_with_video.reference.folder.name
    asked: list[list[str | bytes | Film]] = [
        [film(40, (90, 64)), "What shape is in the image?"],
        [
            picture(1, (57, 131)),
            film(13, (200, 122), fps=3, seed=1),
            "again and",
            picture(2),
            film(5, (64, 150), fps=8),
        ],
        [film(90, (64, 48), fps=30, seed=2), "What?"],
        [film(40, (90, 64)), "Answer in one word."],
    ]
    wanted = [tiny.answer_about(parts) for parts in asked]
    assert len(set(wanted)) == len(wanted)
    for chunk in (0, 40):
        engine = start(precision="fp32", prefill_chunk=chunk)
        for _ in range(3):
            sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
            answers = [ask(engine, Request(name, (message(parts),), sampling)) for parts in asked]
            assert [answer.wait().text for answer in answers] == wanted
        assert answers[-1].finished is not None
        assert answers[-1].finished.usage.reused_tokens > 0
