"""Prompts equal those of transformers' processors, token by token and position by position."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator
from PIL import Image as Picture
from transformers import (
    AutoTokenizer,
    Idefics3Processor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLModel,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from engine.preprocess import ImageInput, image_processor
from engine.prompts import Prompt, PromptBuilder
from engine.request import Image, Message, Role, Text
from tests.preprocess.specs import siglip_spec, text_spec
from tests.prompts import checkpoints
from tests.prompts.checkpoints import Reference, as_dicts, picture, question

DEMO = Path(__file__).resolve().parents[2] / "demo"
WORDS = [
    "What ",
    "shape?",
    " \n\n",
    "naïve 你好",
    "  ",
    "👩‍👩‍👧",
    "a\tb",
    "Assistant:",
    "<image",
    "im_end|>",
    "12345",
    "<tool_call>",
]


def conversation(random: Generator, images: int, *, system: bool = True) -> tuple[list[Message], list[Picture.Image]]:
    """Turns of texts with images strewn among them."""
    pictures = [picture(*random.integers(1, 140, 2)) for _ in range(images)]
    turns: list[list[Any]] = [[] for _ in range(random.integers(1, 4))]
    for shown in pictures:
        turns[random.integers(len(turns))].append(shown)
    messages = [Message("system", (Text(sentence(random)),))] if system and random.random() < 0.5 else []
    for turn in turns:
        parts: list[Any] = []
        for _ in turn:
            parts += [Image(b""), Text(sentence(random))] if random.random() < 0.5 else [Image(b"")]
        parts.insert(int(random.integers(len(parts) + 1)), Text(sentence(random)))
        messages += [Message("user", tuple(parts)), Message("assistant", (Text(sentence(random)),))]
    return messages[:-1], [shown for turn in turns for shown in turn]


def sentence(random: Generator) -> str:
    return "".join(random.choice(WORDS, random.integers(1, 6)))


def inputs(reference: Reference, pictures: list[Picture.Image]) -> list[ImageInput]:
    processor = image_processor(reference.folder, reference.spec)
    return [processor.process(shown, bytes([number])) for number, shown in enumerate(pictures)]


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return checkpoints.smolvlm(tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return checkpoints.gemma3(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return checkpoints.qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return checkpoints.qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.mark.parametrize("seed", range(40))
def test_smolvlm_prompts_are_those_of_transformers(seed: int, smolvlm: Reference) -> None:
    messages, pictures = conversation(np.random.default_rng(seed), seed % 5)
    builder = PromptBuilder(smolvlm.folder, smolvlm.spec)
    images = inputs(smolvlm, pictures)
    prompt = builder.build(messages, images)
    assert prompt.token_ids.tolist() == smolvlm.inputs(messages, pictures)["input_ids"][0].tolist()
    assert prompt.positions.tolist() == [list(range(len(prompt.token_ids)))]
    assert prompt.position_delta == 0
    assert builder.count(messages, images) == len(prompt.token_ids)


@pytest.mark.parametrize("seed", range(40))
def test_gemma3_prompts_are_those_of_transformers(seed: int, gemma3: Reference) -> None:
    messages, pictures = conversation(np.random.default_rng(seed), seed % 5)
    builder = PromptBuilder(gemma3.folder, gemma3.spec)
    images = inputs(gemma3, pictures)
    prompt = builder.build(messages, images)
    wanted = gemma3.inputs(messages, pictures)
    assert prompt.token_ids.tolist() == wanted["input_ids"][0].tolist()
    assert prompt.whole_images
    is_image = np.zeros(len(prompt.token_ids), np.int64)
    for span in prompt.image_spans:
        is_image[span.start : span.stop] = 1
    assert is_image.tolist() == wanted["token_type_ids"][0].tolist()
    assert_consistent(prompt, images, 7)
    assert builder.count(messages, images) == len(prompt.token_ids)
    if pictures:
        raw = gemma3.processor.image_processor(pictures, do_rescale=False, do_normalize=False, return_tensors="np")
        assert np.array_equal(np.concatenate([image.pixels for image in images]), raw["pixel_values"])


@pytest.mark.parametrize("seed", range(40))
def test_qwen2_vl_prompts_are_those_of_transformers(seed: int, qwen2_vl: Reference) -> None:
    messages, pictures = conversation(np.random.default_rng(seed), seed % 5)
    builder = PromptBuilder(qwen2_vl.folder, qwen2_vl.spec)
    images = inputs(qwen2_vl, pictures)
    prompt = builder.build(messages, images)
    wanted = qwen2_vl.inputs(messages, pictures)
    assert prompt.token_ids.tolist() == wanted["input_ids"][0].tolist()
    positions, delta = rope_index(wanted)
    assert prompt.positions.tolist() == positions
    assert prompt.position_delta == delta
    assert builder.count(messages, images) == len(prompt.token_ids)


@pytest.mark.parametrize("seed", range(20))
def test_qwen3_vl_prompts_are_those_of_transformers(seed: int, qwen3_vl: Reference) -> None:
    messages, pictures = conversation(np.random.default_rng(seed), seed % 5)
    builder = PromptBuilder(qwen3_vl.folder, qwen3_vl.spec)
    images = inputs(qwen3_vl, pictures)
    prompt = builder.build(messages, images)
    wanted = qwen3_vl.inputs(messages, pictures)
    assert prompt.token_ids.tolist() == wanted["input_ids"][0].tolist()
    tower = {"depth": 1, "hidden_size": 16, "num_heads": 2, "deepstack_visual_indexes": []}
    positions, delta = rope_index(wanted, Qwen3VLModel, Qwen3VLConfig, tower)
    assert prompt.positions.tolist() == positions
    assert prompt.position_delta == delta
    assert builder.count(messages, images) == len(prompt.token_ids)


@pytest.mark.parametrize("seed", range(5))
def test_qwen2_5_vl_counts_positions_of_images_as_qwen2_vl_does(seed: int, qwen2_vl: Reference) -> None:
    messages, pictures = conversation(np.random.default_rng(seed), 1 + seed % 4)
    wanted = qwen2_vl.inputs(messages, pictures)
    prompt = PromptBuilder(qwen2_vl.folder, qwen2_vl.spec).build(messages, inputs(qwen2_vl, pictures))
    found = rope_index(wanted, Qwen2_5_VLModel, Qwen2_5_VLConfig, {"depth": 1, "hidden_size": 16, "num_heads": 2})
    assert (prompt.positions.tolist(), prompt.position_delta) == found


def rope_index(
    wanted: Any, model_class: Any = Qwen2VLModel, config_class: Any = Qwen2VLConfig, tower: Any = None
) -> tuple[list[list[int]], int]:
    with torch.device("meta"):
        model: Any = model_class(
            config_class(
                text_config={"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 9},
                vision_config=tower or {"depth": 1, "embed_dim": 16, "num_heads": 2},
            )
        )
    grid = torch.tensor(wanted["image_grid_thw"]) if "image_grid_thw" in wanted else None
    positions, delta = model.get_rope_index(
        torch.tensor(wanted["input_ids"]), torch.tensor(wanted["mm_token_type_ids"]), image_grid_thw=grid
    )
    return positions[:, 0].tolist(), int(delta)


def test_image_tokens_point_at_features_in_reading_order(smolvlm: Reference) -> None:
    pictures = [picture(30, 30), picture(90, 30)]
    images = inputs(smolvlm, pictures)
    prompt = PromptBuilder(smolvlm.folder, smolvlm.spec).build([question("a", pictures[0], pictures[1], "b")], images)
    assert_consistent(prompt, images, smolvlm.processor.image_token_id)
    assert [image.tokens for image in images] == [160, 64]


def assert_consistent(prompt: Prompt, images: list[ImageInput], image_token: int) -> None:
    is_image = prompt.token_ids == image_token
    assert prompt.feature_index[is_image].tolist() == list(range(prompt.image_tokens))
    assert (prompt.feature_index[~is_image] == -1).all()
    assert prompt.image_tokens == sum(image.tokens for image in images)
    for span, image in zip(prompt.image_spans, images, strict=True):
        assert is_image[span.start : span.stop].sum() == image.tokens
        assert is_image[span.start]
        assert is_image[span.stop - 1]
        assert span.key == image.key
    assert prompt.token_ids.dtype == prompt.feature_index.dtype == prompt.positions.dtype == np.int64


def test_a_tokenizers_own_first_token_is_added_unless_the_template_wrote_it(tmp_path: Path) -> None:
    template = checkpoints.SMOLVLM_TEMPLATE
    for number, text in enumerate((template, template.removeprefix("<|im_start|>"))):
        folder = tmp_path / str(number)
        reference = checkpoints.smolvlm(folder, template=text, bos=True)
        wanted: Any = reference.processor.apply_chat_template(
            as_dicts([question("Hi")]), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        prompt = PromptBuilder(folder, reference.spec).build([question("Hi")], [])
        assert prompt.token_ids.tolist() == list(wanted["input_ids"][0])
        assert prompt.token_ids.tolist().count(1) == 1


@pytest.mark.parametrize("text", ["Hello", " two  spaces", "naïve 你好 👩‍👩‍👧", "line\nbreak"])
def test_text_only_prompts_are_those_of_transformers(text: str, tmp_path: Path) -> None:
    tokenizer = checkpoints.llama(tmp_path)
    turns: list[tuple[Role, str]] = [("user", "Hi"), ("assistant", "Hello."), ("user", text)]
    wanted: Any = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], add_generation_prompt=True, return_dict=True
    )
    builder = PromptBuilder(tmp_path, text_spec())
    messages = [Message(role, (Text(content),)) for role, content in turns]
    assert builder.build(messages, []).token_ids.tolist() == list(wanted["input_ids"])
    assert builder.count(messages, []) == len(wanted["input_ids"])


def test_a_folder_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    reference = checkpoints.qwen2_vl(tmp_path)
    reference.processor.tokenizer.backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    special = {str(token): text for text, token in reference.processor.tokenizer.get_added_vocab().items()}
    checkpoints.change_json(
        tmp_path / "tokenizer_config.json",
        tokenizer_class="Qwen2Tokenizer",
        added_tokens_decoder={token: {"content": text, "special": True} for token, text in special.items()},
    )
    text = "<|im_start|>Größe, naïve café and 12345 numbers"
    wanted = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert PromptBuilder(tmp_path, reference.spec).tokenizer.encode(text) == wanted


def test_the_demo_models_prompts_are_those_of_transformers() -> None:
    spec = siglip_spec(128, patch=16, shuffle=2, image=259)
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(DEMO),
        AutoTokenizer.from_pretrained(DEMO),
        image_seq_len=16,
        chat_template=(DEMO / "chat_template.jinja").read_text(),
    )
    reference = Reference(DEMO, spec, processor)
    for seed in range(10):
        messages, pictures = conversation(np.random.default_rng(seed), seed % 3)
        images = inputs(reference, pictures)
        prompt = PromptBuilder(DEMO, spec).build(messages, images)
        wanted = reference.inputs(messages, pictures)
        assert prompt.token_ids.tolist() == wanted["input_ids"][0].tolist()
        assert_consistent(prompt, images, 259)
        if pictures:
            raw = processor.image_processor(pictures, do_rescale=False, do_normalize=False, return_tensors="np")
            assert np.array_equal(np.concatenate([image.pixels for image in images]), raw["pixel_values"][0])


def test_many_threads_build_prompts_at_once(smolvlm: Reference) -> None:
    builder = PromptBuilder(smolvlm.folder, smolvlm.spec)
    talks = [conversation(np.random.default_rng(seed), seed % 4) for seed in range(24)]
    work = [(messages, inputs(smolvlm, pictures)) for messages, pictures in talks]
    alone = [builder.build(*item).token_ids.tolist() for item in work]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: builder.build(*item).token_ids.tolist(), work * 4))
    assert together == alone * 4
