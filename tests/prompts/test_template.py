"""Chat templates: where they are found, what they lack, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import CheckpointError, InvalidRequest
from engine.prompts import PromptBuilder
from engine.prompts.template import ChatTemplate
from engine.request import Image, Message, Text
from tests.preprocess.specs import siglip_spec, text_spec
from tests.prompts import checkpoints
from tests.prompts.checkpoints import change_json, image_input, question

SYSTEM = Message("system", (Text("Be brief."),))
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def template(folder: Path, text: str, *, has_images: bool = False) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(text)
    return ChatTemplate(folder, has_images=has_images)


def test_a_template_without_a_system_role_gets_system_text_in_the_first_question(tmp_path: Path) -> None:
    raising = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    silent = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for text in (raising, silent):
        rendered = template(tmp_path, text).render([SYSTEM, question("Hi"), question("you")])
        assert rendered == "user: Be brief.\n\nHi\nuser: you\n"
    assert template(tmp_path, raising).render([SYSTEM]) == "user: Be brief.\n"
    assert template(tmp_path, PLAIN).render([SYSTEM, question("Hi")]) == "system: Be brief.\nuser: Hi\n"


def test_what_a_template_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    strict = "{% if messages | length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}" + PLAIN
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template(tmp_path, strict).render([question("a"), question("b")])
    lists_only = "{{ messages[1].content | list + messages[0].content }}{% if false %}" + PLAIN + "{% endif %}"
    (tmp_path / "chat_template.jinja").write_text("{% if messages | length > 1 %}" + lists_only + "{% endif %}")
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        ChatTemplate(tmp_path, has_images=False).render([question("a"), question("b")])


def test_a_message_without_parts_renders_as_empty_text(tmp_path: Path) -> None:
    with_parts = template(tmp_path, checkpoints.SMOLVLM_TEMPLATE, has_images=True)
    assert with_parts.render([Message("user", ())]) == "<|im_start|>User: <end_of_utterance>\nAssistant:"
    assert template(tmp_path, PLAIN).render([Message("assistant", ())]) == "assistant: \n"


def test_templates_know_what_transformers_offers(tmp_path: Path) -> None:
    change = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "model_max_length": 5}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(change))
    text = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m | tojson }}"
        "{% endfor %}{{ eos_token }}{% if tools is none and strftime_now('%Y') | int > 2000 %}!{% endif %}"
    )
    rendered = template(tmp_path, text).render([question("<é>"), question("x")])
    assert rendered == '<s>{"role": "user", "content": "<é>"}</s>!'


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fails on a plain question"):
        template(tmp_path, "{{ messages.__class__.__mro__ }}")


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json", "tokenizer_config.json"])
def test_a_template_is_found_in_every_layout(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"chat_template": PLAIN}))
    assert ChatTemplate(tmp_path, has_images=False).render([question("Hi")]) == "user: Hi\n"


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": PLAIN}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert ChatTemplate(tmp_path, has_images=False).render([question("Hi")]) == "user: Hi\n"


def test_missing_and_malformed_templates_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no chat template.*chat_template\.jinja"):
        ChatTemplate(tmp_path, has_images=False)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not a valid chat template"):
        template(tmp_path, "{% if %}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        ChatTemplate(tmp_path, has_images=False)


def test_missing_and_malformed_tokenizers_are_named(tmp_path: Path) -> None:
    checkpoints.llama(tmp_path)
    file = tmp_path / "tokenizer.json"
    for content in ("", "{}", file.read_text()[:5000]):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
            PromptBuilder(tmp_path, text_spec())
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        PromptBuilder(tmp_path, text_spec())


def test_a_malformed_tokenizer_config_is_named(tmp_path: Path) -> None:
    checkpoints.llama(tmp_path)
    for content in (b"[]", b"{", b"\xff"):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            PromptBuilder(tmp_path, text_spec())


def test_an_image_token_the_tokenizer_does_not_know_is_named(tmp_path: Path) -> None:
    reference = checkpoints.smolvlm(tmp_path)
    for token in (None, 99_999, 65):
        spec = siglip_spec(32, patch=4, shuffle=2, image=token)
        with pytest.raises(CheckpointError, match="image token"):
            PromptBuilder(tmp_path, spec)
    without = checkpoints.SMOLVLM_TEMPLATE.replace("<image>", "")
    (tmp_path / "chat_template.jinja").write_text(without)
    with pytest.raises(CheckpointError, match="writes <image> 0 times for one image"):
        PromptBuilder(tmp_path, reference.spec)


def test_padding_and_truncation_of_a_tokenizer_file_do_not_apply(tmp_path: Path) -> None:
    checkpoints.llama(tmp_path)
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    change_json(tmp_path / "tokenizer.json", truncation=truncation)
    assert len(PromptBuilder(tmp_path, text_spec()).tokenizer.encode("one two three four five six")) > 4


def test_a_message_of_images_only_is_a_prompt(tmp_path: Path) -> None:
    reference = checkpoints.smolvlm(tmp_path)
    assert PromptBuilder(tmp_path, reference.spec).count([Message("user", (Image(b""),))], [image_input(16)]) > 16
