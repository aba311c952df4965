"""The committed demo model: its files agree with the script that trained it and with transformers."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Idefics3ForConditionalGeneration, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from evaluation import easy_vqa, printed_words
from evaluation.samples import Sample
from tools.demo_check import answers, image_features, logits, rounded
from tools.demo_data import Conversation, collated, conversation, tile
from tools.demo_model import END, IMAGE, IMAGE_TOKENS, PATCH, SHUFFLE, TILE, write_checkpoint
from tools.demo_questions import OTHERWISE

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "demo"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that threads cost more than they bring, above all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Idefics3ForConditionalGeneration:
    return Idefics3ForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor() -> Idefics3Processor:
    """Put together by hand: AutoProcessor wants torchvision."""
    return Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(DEMO),
        AutoTokenizer.from_pretrained(DEMO),
        image_seq_len=json.loads((DEMO / "processor_config.json").read_text())["image_seq_len"],
        chat_template=(DEMO / "chat_template.jinja").read_text(),
    )


def test_the_checkpoint_is_small_fp16_and_for_long_contexts() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 10_000_000
    config = AutoConfig.from_pretrained(DEMO)
    assert config.model_type == "idefics3"
    assert config.dtype == torch.float16
    assert config.text_config.max_position_embeddings >= 2048
    assert (TILE // PATCH // SHUFFLE) ** 2 == IMAGE_TOKENS


def test_writing_the_weights_again_gives_the_committed_files(
    model: Idefics3ForConditionalGeneration, tmp_path: Path
) -> None:
    write_checkpoint(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in DEMO.iterdir()}
    for file in tmp_path.iterdir():
        if file.suffix == ".json":
            assert json.loads(file.read_text()) == json.loads((DEMO / file.name).read_text()), file.name
        else:
            assert file.read_bytes() == (DEMO / file.name).read_bytes(), file.name


def test_the_tokenizer_is_bytes(processor: Idefics3Processor) -> None:
    text = "Was heißt «größer»? 你好 \n\t end"
    assert processor.tokenizer(text)["input_ids"] == [*text.encode()]
    assert processor.tokenizer.decode([*text.encode()]) == text


def test_training_sees_prompts_and_pixels_as_transformers_makes_them(processor: Idefics3Processor) -> None:
    sample = next(iter(printed_words.test_samples(1)))
    image = Image.open(io.BytesIO(sample.image))
    parts = [{"type": "image"}, {"type": "text", "text": sample.question}]
    talk = Conversation()
    talk.system("Be brief.")
    talk.turn(sample.question, "One", tile=tile(image))
    talk.turn("what color is it?", "", tile=tile(image), image_first=False)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "One"},
        {"role": "user", "content": [{"type": "text", "text": "what color is it?"}, {"type": "image"}]},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=[image, image], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == talk.ids[: talk.ids.index(END, len(talk.ids) - 2)]
    for picture in (image, image.resize((40, 90)), image.resize((300, 300))):
        pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0, 0]
        ours = torch.from_numpy(np.array(tile(picture))).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(pixels, ours, atol=1e-6)


def test_the_training_forward_pass_is_that_of_transformers(
    model: Idefics3ForConditionalGeneration, processor: Idefics3Processor
) -> None:
    sample = next(iter(printed_words.test_samples(1)))
    image = Image.open(io.BytesIO(sample.image))
    parts = [{"type": "image"}, {"type": "text", "text": sample.question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=[image], return_tensors="pt")
    talk = Conversation()
    talk.turn(sample.question, "", tile=tile(image))
    batch = collated([talk], inputs["input_ids"].shape[1] + 2, 1)
    with torch.no_grad():
        expected = model(**inputs).logits
        ours = logits(model, image_features(model, batch["pixels"]), batch)[:, : expected.shape[1]]
    assert torch.allclose(ours, expected, atol=1e-4)


def test_only_answers_are_learned() -> None:
    rng = random.Random(7)
    for _ in range(20):
        talk = conversation(rng, 2)
        learned = bytes(t for t, learn in zip(talk.ids, talk.learned, strict=True) if learn and t < 256).decode()
        assert talk.ids.count(IMAGE) == IMAGE_TOKENS * len(talk.tiles)
        assert "User" not in learned
        assert "Assistant" not in learned


def test_the_demo_model_answers_questions_of_both_data_sets(model: Idefics3ForConditionalGeneration) -> None:
    """A spot check; docs/demo-model.md has the accuracy on all of them."""
    samples = [*list(easy_vqa.test_samples())[:4000:500], *printed_words.test_samples(12, seed=8)]
    right = sum(got == sample.answer for sample, got in zip(samples, answers(model, samples), strict=True))
    assert right >= len(samples) - 2


@pytest.mark.parametrize(
    ("file", "question", "answer"),
    [
        ("blue_triangle.png", "what shape is in the image?", "triangle"),
        ("blue_triangle.png", "Which colour is the shape", "blue"),
        ("red_circle.png", "WHAT SHAPE IS SHOWN?", "circle"),
        ("teal_rectangle.jpg", "is there a circle?", "no"),
        ("printed_word.jpg", "read the word", "Coffee"),
        ("printed_capitals.png", "What does the image say?", "MARBLE"),
        ("printed_small.jpg", "What word is printed?", "guitar"),
        ("red_circle.png", "tell me a joke", OTHERWISE[:16]),
    ],
)
def test_the_sample_images_get_right_answers(
    model: Idefics3ForConditionalGeneration, file: str, question: str, answer: str
) -> None:
    image = (ROOT / "samples" / file).read_bytes()
    assert len(image) < 50_000
    assert list(answers(model, [Sample(image, question, answer)])) == [answer]


def test_rounding_keeps_each_row_within_half_a_step_of_its_scale() -> None:
    values = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    scale = values.abs().amax(-1, keepdim=True) / 127
    assert ((rounded(values) - values).abs() <= scale / 2 + 1e-6).all()
