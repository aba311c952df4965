"""An image by URL is that image: same answer, same cache entries, and its troubles end its own request only."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import InvalidImage, InvalidRequest
from engine.request import ImageUrl, Message, Request, Text
from tests.engine.asking import ask, picture, request
from tests.engine.conftest import Start

QUESTION = "what shape is in the image?"


class Images(http.server.ThreadingHTTPServer):
    """Serves `files`, and /slow, which is no image, only once it is `released`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Image)
        self.released = threading.Event()
        self.asked: list[str] = []
        self.files = {"1": picture(1), "2": picture(2), "changing": picture(4)}
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, name: str | int) -> ImageUrl:
        return ImageUrl(f"http://127.0.0.1:{self.server_address[1]}/{name}")


class _Image(http.server.BaseHTTPRequestHandler):
    server: Images

    def do_GET(self) -> None:
        name = self.path[1:]
        self.server.asked.append(name)
        if name == "slow":
            self.server.released.wait(30)
        body = self.server.files.get(name, b"no image")
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def images() -> Iterator[Images]:
    with Images() as server:
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def engine(start: Start, tmp_path: Path) -> Engine:
    return start(storage=tmp_path, cache_enabled=True, allow_private_images="true")


def by_url(*urls: ImageUrl, question: str = QUESTION) -> Request:
    return replace(request(question), messages=(Message("user", (*urls, Text(question))),))


def test_an_image_by_url_is_answered_as_its_file_is_and_from_the_same_cache(engine: Engine, images: Images) -> None:
    expected = ask(engine, request(picture(1), QUESTION)).wait().result
    answer = ask(engine, by_url(images.url(1))).wait()
    assert answer.result == expected
    assert answer.finished is not None
    assert answer.finished.from_cache


def test_another_image_behind_the_same_url_is_another_image(engine: Engine, images: Images) -> None:
    assert ask(engine, by_url(images.url("changing"))).wait().error is None
    images.files["changing"] = picture(5)
    answer = ask(engine, by_url(images.url("changing"))).wait()
    assert answer.finished is not None
    assert not answer.finished.from_cache


def test_several_images_keep_their_order_and_each_is_asked_for_once(engine: Engine, images: Images) -> None:
    expected = ask(engine, request(picture(1), picture(2), picture(1), "which?")).wait().result
    urls = (images.url(1), images.url(2), images.url(1))
    assert ask(engine, by_url(*urls, question="which?")).wait().result == expected
    assert sorted(images.asked) == ["1", "2"]


def test_what_is_no_image_fails_its_request_and_the_next_works(engine: Engine, images: Images) -> None:
    assert isinstance(ask(engine, by_url(images.url("text"))).wait().error, InvalidImage)
    assert ask(engine, by_url(images.url(2))).wait().error is None


def test_slow_servers_hold_up_nobody_who_sent_a_file(engine: Engine, images: Images) -> None:
    waiting = [ask(engine, by_url(images.url("slow"), question=f"{number}?")) for number in range(8)]
    assert ask(engine, request(picture(3), QUESTION)).wait().error is None
    images.released.set()
    assert all(isinstance(answer.wait().error, InvalidImage) for answer in waiting)


def test_a_request_that_was_left_while_its_image_is_fetched_ends_at_once(engine: Engine, images: Images) -> None:
    engine.load("demo")
    answer = ask(engine, by_url(images.url("slow")))
    while not images.asked:
        time.sleep(0.01)
    assert answer.stream is not None
    answer.stream.cancel()
    assert answer.wait(5).error is not None


def test_private_addresses_are_refused_unless_the_form_allows_them(start: Start, images: Images) -> None:
    answer = ask(start(), by_url(images.url(1))).wait()
    assert isinstance(answer.error, InvalidImage)
    assert "allow_private_images" in str(answer.error)
    assert images.asked == []


def test_images_by_url_count_as_images(start: Start, images: Images) -> None:
    with pytest.raises(InvalidRequest, match="2 images in one request; the limit is 1"):
        start(max_images=1).submit(by_url(images.url(1), images.url(2)))


def test_their_tokens_are_counted(engine: Engine, images: Images) -> None:
    expected = engine.count_tokens("demo", request(picture(1), QUESTION).messages)
    assert engine.count_tokens("demo", by_url(images.url(1)).messages) == expected
