"""Bad input through Dify's protocol: each gets a sentence that says what is wrong and what to change."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cli.daemon import Daemon, PluginError, Session
from tests.end_to_end.asking import about, picture, text_of
from tests.robustness.conftest import QUESTION, Works


def _refused(plugin: Daemon, messages: list[dict[str, Any]], *fragments: str, **options: Any) -> PluginError:
    """The error of a request, which must contain all `fragments`."""
    with pytest.raises(PluginError) as raised:
        text_of(plugin.invoke_llm(messages, **options))
    assert [fragment for fragment in fragments if fragment not in str(raised.value)] == [], str(raised.value)
    return raised.value


def _png_of(width: int, height: int) -> bytes:
    """A small file whose header promises many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


IMAGES = {
    "text": (b"hello, world" * 9, ("not an image", "send JPEG, PNG, WebP, GIF, BMP or TIFF")),
    "a PDF": (b"%PDF-1.7\n" + bytes(100), ("a PDF document", "send JPEG")),
    "truncated": (picture(size=512)[:700], ("truncated or damaged", "send the whole file")),
    "a bomb": (_png_of(60_000, 60_000), ("3600 megapixels (60000x60000)", "the limit is 50 (max_image_megapixels)")),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_bad_image_is_refused(plugin: Daemon, works: Works, kind: str) -> None:
    data, fragments = IMAGES[kind]
    assert _refused(plugin, about(data, QUESTION), *fragments).kind == "InvokeBadRequestError"
    works()


def test_a_video_for_a_model_without_video_is_refused(plugin: Daemon, works: Works) -> None:
    video = {"type": "video", "format": "mp4", "mime_type": "video/mp4", "base64_data": "AAAA"}
    messages = [{"role": "user", "content": [video, {"type": "text", "data": QUESTION}]}]
    _refused(plugin, messages, "demo reads text and images only", "choose a model with video")
    works()


@pytest.mark.parametrize("source", [{"base64_data": "@@@@"}, {"base64_data": ""}, {"url": "https://host/image.png"}])
def test_an_image_that_cannot_be_had_is_refused(plugin: Daemon, works: Works, source: dict[str, str]) -> None:
    image = {"type": "image", "format": "png", "mime_type": "image/png", **source}
    messages = [{"role": "user", "content": [image, {"type": "text", "data": QUESTION}]}]
    assert "image" in str(_refused(plugin, messages))
    works()


def test_the_size_limit_of_the_form_holds_for_images_that_were_answered_before(plugin: Daemon, storage: Path) -> None:
    messages = about(picture("rectangle", size=1200), QUESTION)
    assert text_of(plugin.invoke_llm(messages)).strip() == "rectangle"
    limited = {"storage": str(storage), "max_image_megapixels": "1.1", "threads": "1"}
    _refused(plugin, messages, "1.44 megapixels (1200x1200)", "the limit is 1.1", credentials=limited)
    small = about(picture("rectangle", size=1000), QUESTION)
    assert text_of(plugin.invoke_llm(small, credentials=limited)).strip() == "rectangle"


def test_ten_thousand_images_are_refused_in_a_moment(plugin: Daemon, storage: Path, works: Works) -> None:
    (message,) = about(picture(size=200), QUESTION)
    message["content"] = message["content"][:1] * 10_000 + message["content"][1:]
    started = time.perf_counter()
    _refused(plugin, [message], "10000 images", "the limit is 64 (max_images)")
    counted = time.perf_counter()
    allowed = {"storage": str(storage), "max_images": "10000", "threads": "1"}
    _refused(plugin, [message], "the context holds 4096", "use fewer images", credentials=allowed)
    print(f"10000 images: refused by number in {counted - started:.2f} s, by context in", end=" ")
    print(f"{time.perf_counter() - counted:.2f} s, the start of an engine included")
    assert time.perf_counter() - started < 60
    works()


@pytest.mark.parametrize("content", ["", " \n", [], [{"type": "text", "data": ""}]])
def test_an_empty_prompt_is_refused(plugin: Daemon, content: object) -> None:
    _refused(plugin, [{"role": "user", "content": content}], "the prompt is empty")


def test_a_prompt_without_an_image_is_an_ordinary_request(plugin: Daemon) -> None:
    *texts, last = plugin.invoke_llm([{"role": "user", "content": QUESTION}], {"max_tokens": 8})
    assert text_of(texts).strip()
    assert 0 < last["delta"]["usage"]["prompt_tokens"] < 60


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(plugin: Daemon, works: Works) -> None:
    messages = [{"role": "user", "content": "word " * 1000}]
    needed = plugin.num_tokens(messages)
    assert needed > 4096
    _refused(plugin, messages, f"the prompt is {needed} tokens", "the context holds 4096", "Shorten the prompt")
    works()


def test_a_text_of_many_megabytes_is_refused_without_tokenising_it(plugin: Daemon, works: Works) -> None:
    messages = [{"role": "user", "content": "word " * (4 << 20)}]
    started = time.perf_counter()
    _refused(plugin, messages, "the prompt is 20971520 characters", "4096 tokens", "Shorten the prompt")
    print(f"20 MiB of text: refused in {time.perf_counter() - started:.2f} s")
    works()


@pytest.mark.parametrize(
    ("parameters", "fragments"),
    [
        ({"temperature": "hot"}, ("temperature", "float")),
        ({"temperature": 2.5}, ("temperature", "less than or equal to 2")),
        ({"temperature": -1}, ("temperature", "greater than or equal to 0")),
        ({"top_p": 0}, ("top_p", "greater than or equal to 0.01")),
        ({"top_k": 1.5}, ("top_k", "int")),
        ({"top_k": True}, ("top_k", "whole number")),
        ({"min_p": 2}, ("min_p", "less than or equal to 1")),
        ({"max_tokens": 0}, ("max_tokens", "greater than or equal to 1")),
        ({"max_tokens": 5000}, ("max_tokens", "less than or equal to 4096")),
        ({"repetition_penalty": 0}, ("repetition_penalty", "greater than or equal to 0.1")),
        ({"presence_penalty": [1]}, ("presence_penalty", "float")),
        ({"frequency_penalty": 3}, ("frequency_penalty", "less than or equal to 2")),
        ({"seed": -1}, ("seed is -1", "between 0 and")),
        ({"seed": 2**64}, ("seed is 18446744073709551616", "between 0 and")),
        ({"ignore_eos": "yes"}, ("ignore_eos", "bool")),
    ],
    ids=str,
)
def test_a_wrong_parameter_is_refused(plugin: Daemon, parameters: dict[str, Any], fragments: tuple[str, ...]) -> None:
    error = _refused(plugin, about(picture(), QUESTION), *fragments, parameters=parameters)
    assert error.kind == "InvokeBadRequestError"


@pytest.mark.parametrize(("stop", "fragment"), [([""], "at least one character"), (["x"] * 20, "at most 16")])
def test_wrong_stop_words_are_refused(plugin: Daemon, works: Works, stop: list[str], fragment: str) -> None:
    _refused(plugin, about(picture(), QUESTION), fragment, stop=stop)
    works()


@pytest.mark.parametrize(
    ("settings", "fragments"),
    [
        ({"storage": "somewhere"}, ("storage is 'somewhere'", "absolute path")),
        ({"storage": "/etc/passwd"}, ("/etc/passwd cannot be used as storage", "name another storage folder")),
        ({"max_batch_size": "0"}, ("max_batch_size is 0", "between 1 and")),
        ({"max_waiting": "many"}, ("max_waiting is 'many'", "number")),
        ({"precision": "int4"}, ("precision is 'int4'", "auto, fp32, int8")),
        ({"cache_enabled": "perhaps"}, ("cache_enabled is 'perhaps'", "true or false")),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_the_form_and_by_requests(
    plugin: Daemon, storage: Path, settings: dict[str, str], fragments: tuple[str, ...]
) -> None:
    form = {"storage": str(storage)} | settings
    _refused(plugin, about(picture(), QUESTION), *fragments, credentials=form)
    with pytest.raises(PluginError, match="|".join(fragments)):
        plugin.validate_provider(form)


@pytest.mark.parametrize("model", ["gone", "../models", "demo/.."])
def test_an_unknown_model_is_refused_with_the_known_ones(plugin: Daemon, works: Works, model: str) -> None:
    _refused(plugin, about(picture(), QUESTION), f"unknown model '{model}'", "demo", "put its", model=model)
    works()


def test_an_error_that_quotes_millions_of_characters_fits_a_line(plugin: Daemon, storage: Path, works: Works) -> None:
    messages = about(picture(), QUESTION)
    _refused(plugin, messages, "unknown model 'xxxx", "To add one, put its", model="x" * (6 << 20))
    _refused(plugin, messages, "storage is 'xxxx", "absolute path", credentials={"storage": "x" * (6 << 20)})
    assert plugin.longest_line < 1 << 20
    works()


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _with(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def _cut(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return cut


def _configured(name: str, value: int) -> Callable[[Path], None]:
    def configure(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_bytes())
        config["text_config"][name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return configure


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no config": (_without("config.json"), ("config.json is missing", "download the checkpoint again")),
    "half a config": (_cut("config.json"), ("config.json is not valid JSON", "download it again")),
    "a list as config": (_with("config.json", b"[]"), ("config.json must hold a JSON object",)),
    "a foreign family": (_with("config.json", b'{"model_type": "bert"}'), ("bert",)),
    "another shape": (_configured("intermediate_size", 7), ("config.json asks for", "do not belong together")),
    "too many layers": (_configured("num_hidden_layers", 10**9), ("asks for 1000000003 layers", "belong together")),
    "no weights": (_without("model.safetensors"), ("model.safetensors is missing", "download the checkpoint again")),
    "half the weights": (_cut("model.safetensors"), ("model.safetensors is truncated", "download it again")),
    "no tokenizer": (_without("tokenizer.json"), ("tokenizer.json",)),
    "half a tokenizer": (_cut("tokenizer.json"), ("tokenizer.json",)),
    "no chat template": (_without("chat_template.jinja"), ("chat template", "add the file")),
    "half a chat template": (_with("chat_template.jinja", b"{% for"), ("chat_template.jinja is not a valid",)),
    "image settings of zero": (_with("preprocessor_config.json", b'{"image_std": [0, 0, 0]}'), ("three positive",)),
    "half the image settings": (_cut("preprocessor_config.json"), ("preprocessor_config.json",)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_bad_checkpoint_folder_is_named_with_its_file(
    plugin: Daemon, works: Works, brought: Callable[[str], Path], kind: str
) -> None:
    damage, fragments = CHECKPOINTS[kind]
    folder = brought("brought")
    damage(folder)
    messages = about(picture(), QUESTION)
    error = _refused(plugin, messages, str(folder), *fragments, model="brought")
    assert error.kind == "InvokeServerUnavailableError"
    works()


def test_a_checkpoint_folder_works_once_it_is_repaired(plugin: Daemon, brought: Callable[[str], Path]) -> None:
    folder = brought("repaired")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:5000])
    messages = about(picture(), QUESTION)
    _refused(plugin, messages, "truncated", model="repaired")
    (folder / "model.safetensors").write_bytes(weights)
    assert text_of(plugin.invoke_llm(messages, model="repaired")).strip() == "circle"


def _endings(plugin: Daemon, requests: int, form: dict[str, str]) -> list[PluginError | None]:
    """How long answers asked for at once end, every stream read as it comes."""
    long = {"max_tokens": 4000, "ignore_eos": True, "temperature": 1.0}
    sessions = [plugin.invoke_llm(about(picture(), str(n)), long, credentials=form) for n in range(requests)]

    def ending(session: Session) -> PluginError | None:
        try:
            text_of(session)
        except PluginError as error:
            return error
        return None

    with ThreadPoolExecutor(requests) as readers:
        return list(readers.map(ending, sessions))


@pytest.fixture
def one_by_one(storage: Path) -> dict[str, str]:
    """A form whose engine computes one request at a time and none of them for long."""
    return {"storage": str(storage), "max_batch_size": "1", "request_timeout_s": "4", "threads": "1"}


def test_a_full_queue_says_so(plugin: Daemon, one_by_one: dict[str, str], works: Works) -> None:
    form = one_by_one | {"max_waiting": "1"}
    text_of(plugin.invoke_llm(about(picture(), QUESTION), credentials=form))  # loads the model
    errors = [error for error in _endings(plugin, 8, form) if error is not None and "queue" in str(error)]
    assert len(errors) == 6  # one runs, one waits; which of the eight is first is not promised
    assert {error.kind for error in errors} == {"InvokeRateLimitError"}
    assert {str(error) for error in errors} == {"the queue is full (1 waiting); try again or raise max_waiting"}
    assert text_of(plugin.invoke_llm(about(picture(), QUESTION), credentials=form)).strip() == "circle"
    works()


def test_a_passed_deadline_says_so(plugin: Daemon, one_by_one: dict[str, str], works: Works) -> None:
    text_of(plugin.invoke_llm(about(picture(), QUESTION), credentials=one_by_one))
    errors = [error for error in _endings(plugin, 32, one_by_one) if error is not None]
    assert errors  # 128,000 tokens, one at a time, are more than any machine computes in 4 s
    assert [error for error in errors if "time limit" not in str(error)] == []
    assert text_of(plugin.invoke_llm(about(picture(), QUESTION), credentials=one_by_one)).strip() == "circle"
    works()
