"""Dify's prompt messages become the engine's request, or an error that says what to change."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from dify_plugin.entities.model.message import PromptMessage, ensure_prompt_message

from engine.errors import InvalidImage, InvalidParameter, InvalidRequest, InvalidVideo
from engine.request import Detail, Image, ImageUrl, Message, SamplingParams, Text, Video, VideoUrl
from models.llm.parameters import sampling_params
from models.llm.prompt import engine_messages, engine_request

BYTES = bytes(range(256))
BASE64 = base64.b64encode(BYTES).decode()


def said(role: str, content: Any, **more: Any) -> PromptMessage:
    return ensure_prompt_message({"role": role, "content": content, **more})


def image(**fields: str) -> dict[str, str]:
    return {"type": "image", "format": "png", "mime_type": "image/png", **fields}


def test_roles_and_order_are_kept() -> None:
    messages = engine_messages(
        [
            said("system", "be brief"),
            said("user", "hello"),
            said("assistant", "hi"),
            said("user", "bye"),
        ]
    )
    assert messages == (
        Message("system", (Text("be brief"),)),
        Message("user", (Text("hello"),)),
        Message("assistant", (Text("hi"),)),
        Message("user", (Text("bye"),)),
    )


def test_developer_speaks_as_system() -> None:
    assert engine_messages([said("developer", "rules")])[0].role == "system"


def test_images_and_texts_keep_their_order() -> None:
    content = [image(base64_data=BASE64), {"type": "text", "data": "and"}, image(base64_data=BASE64)]
    (message,) = engine_messages([said("user", content)])
    assert message.parts == (Image(BYTES), Text("and"), Image(BYTES))


@pytest.mark.parametrize(
    "fields",
    [
        {"base64_data": BASE64},
        {"base64_data": f"data:image/png;base64,{BASE64}"},
        {"url": f"data:image/png;base64,{BASE64}"},
        {"base64_data": "\n".join(BASE64[start : start + 76] for start in range(0, len(BASE64), 76)) + "\n"},
        {"base64_data": BASE64.rstrip("=")},
    ],
    ids=["base64", "data URI as base64", "data URI as URL", "broken lines", "no padding"],
)
def test_an_image_arrives_as_its_bytes(fields: dict[str, str]) -> None:
    (message,) = engine_messages([said("user", [image(**fields)])])
    assert message.parts == (Image(BYTES),)


@pytest.mark.parametrize(
    ("given", "expected"), [({"detail": "low"}, "low"), ({"detail": "high"}, "high"), ({}, "high")]
)
def test_low_detail_is_what_dify_asks_for(given: dict[str, str], expected: Detail) -> None:
    pictures = [image(base64_data=BASE64, **given), image(url="https://example.com/a.png", **given)]
    (message,) = engine_messages([said("user", pictures)])
    assert message.parts == (Image(BYTES, expected), ImageUrl("https://example.com/a.png", expected))


def test_an_image_by_url_is_left_to_the_engine_to_fetch() -> None:
    (message,) = engine_messages([said("user", [image(url="https://example.com/a.png")])])
    assert message.parts == (ImageUrl("https://example.com/a.png"),)


@pytest.mark.parametrize("data", ["not base64!", "QUJD*", "QQ=A"])
def test_what_is_not_base64_is_refused(data: str) -> None:
    with pytest.raises(InvalidImage, match="base64"):
        engine_messages([said("user", [image(base64_data=data)])])


def test_an_empty_image_is_refused_by_name() -> None:
    with pytest.raises(InvalidImage, match=r"'a\.png' is empty"):
        engine_messages([said("user", [image(filename="a.png")])])


def test_a_video_arrives_as_its_bytes_or_is_left_to_the_engine_to_fetch() -> None:
    common = {"type": "video", "format": "mp4", "mime_type": "video/mp4"}
    contents = [{"base64_data": BASE64}, {"url": f"data:video/mp4;base64,{BASE64}"}, {"url": "https://x.example/a.mp4"}]
    (message,) = engine_messages([said("user", [common | content for content in contents])])
    assert message.parts == (Video(BYTES), Video(BYTES), VideoUrl("https://x.example/a.mp4"))
    with pytest.raises(InvalidVideo, match="base64"):
        engine_messages([said("user", [common | {"base64_data": "not base64!"}])])
    with pytest.raises(InvalidVideo, match=r"'a\.mp4' is empty"):
        engine_messages([said("user", [common | {"filename": "a.mp4"}])])


def test_a_video_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.request.MAX_VIDEO_MIB", 0)
    with pytest.raises(InvalidVideo, match="the limit is 0 MiB"):
        Video(BYTES)


@pytest.mark.parametrize("kind", ["audio", "document"])
def test_other_files_are_refused_by_kind(kind: str) -> None:
    content = {"type": kind, "format": "x", "mime_type": "x/y", "base64_data": BASE64}
    with pytest.raises(InvalidRequest, match=kind):
        engine_messages([said("user", [content])])


@pytest.mark.parametrize("content", ["", [], None, [{"type": "text", "data": ""}]])
def test_messages_without_content_are_left_out(content: Any) -> None:
    assert engine_messages([said("system", content), said("user", "x")]) == (Message("user", (Text("x"),)),)


@pytest.mark.parametrize("content", ["", "  \n", []])
def test_an_empty_prompt_is_refused(content: Any) -> None:
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        engine_request("demo", [said("user", content)], {})


def test_parameters_and_stop_words_are_handed_on() -> None:
    params = sampling_params({"temperature": 0.5, "top_k": 3, "seed": None, "ignore_eos": True}, ["END"])
    assert params == SamplingParams(temperature=0.5, top_k=3, ignore_eos=True, stop=("END",))


@pytest.mark.parametrize(
    "parameters", [{"temperature": "warm"}, {"top_k": 1.5}, {"max_tokens": 0}, {"seed": True}, {"warmth": 1}]
)
def test_a_wrong_parameter_is_named(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(parameters))):
        sampling_params(parameters)


@pytest.mark.parametrize("stop", [[""], [str(number) for number in range(100)]])
def test_wrong_stop_words_are_refused(stop: list[str]) -> None:
    with pytest.raises(InvalidParameter, match="stop word"):
        sampling_params({}, stop)
