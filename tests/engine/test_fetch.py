"""Images by URL: what is fetched, what is refused, and that nothing leads to an address that was not judged."""

from __future__ import annotations

import http.server
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest

from engine import fetch
from engine.errors import InvalidImage
from engine.fetch import FetchLimits, fetch_image

BYTES = bytes(range(256)) * 512
OPEN = FetchLimits(max_bytes=1 << 20, allow_private=True, timeout_s=30)
Serve = Callable[[http.server.BaseHTTPRequestHandler], None]


class Site(http.server.ThreadingHTTPServer):
    """A server on a loopback port whose pages are functions."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Pages)
        self.pages: dict[str, Serve] = {"/a.png": page(BYTES)}
        self.asked: list[str] = []
        self.hosts: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str = "/a.png", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_address[1]}{path}"


class _Pages(http.server.BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.hosts.append(self.headers["Host"])
        self.server.pages[urlsplit(self.path).path](self)

    def log_message(self, *arguments: object) -> None: ...


def page(body: bytes, status: int = 200, *, location: str = "", length: str = "") -> Serve:
    def serve(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", length or str(len(body)))
        if location:
            request.send_header("Location", location)
        request.end_headers()
        request.wfile.write(body)

    return serve


def moved(location: str, status: int = 302) -> Serve:
    return page(b"", status, location=location)


def drip(length: int | None) -> Serve:
    """A byte every 20 ms, which no time limit on single reads would ever end."""

    def serve(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        if length is not None:
            request.send_header("Content-Length", str(length))
        request.end_headers()
        for _ in range(500):
            try:
                request.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.02)

    return serve


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        yield server
        server.shutdown()


def test_the_bytes_behind_a_url_are_fetched(site: Site) -> None:
    assert fetch_image(site.url("/a.png?sign=a%2Fb&x=ü"), OPEN) == BYTES
    assert site.asked == ["/a.png?sign=a%2Fb&x=%C3%BC"]
    assert site.hosts == [f"127.0.0.1:{site.server_address[1]}"]


def test_a_body_without_a_length_is_read_to_its_end(site: Site) -> None:
    def serve(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(BYTES)

    site.pages["/open"] = serve
    assert fetch_image(site.url("/open"), OPEN) == BYTES


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(site: Site, status: int) -> None:
    site.pages["/old"] = moved("a.png", status)
    assert fetch_image(site.url("/old"), OPEN) == BYTES


def test_redirects_end(site: Site) -> None:
    site.pages["/round"] = moved("/round")
    with pytest.raises(InvalidImage, match="redirected more than 5 times"):
        fetch_image(site.url("/round"), OPEN)
    assert len(site.asked) == 6


def test_a_redirect_to_another_kind_of_address_is_refused(site: Site) -> None:
    site.pages["/file"] = moved("file:///etc/passwd")
    with pytest.raises(InvalidImage, match="only http and https"):
        fetch_image(site.url("/file"), OPEN)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://example.com/a.png", "gopher://example.com/", "a.png", "http:///a.png", "http://[::1",
     "http://example.com:port/", "//example.com/a.png"],
)  # fmt: skip
def test_what_is_no_http_url_is_refused_before_anything_is_asked(url: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("a name was resolved")

    with pytest.raises(InvalidImage, match="an image's address"):
        fetch_image(url, OPEN, resolve=resolve)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_a_loopback_address_is_refused_however_it_is_spelled(site: Site, host: str) -> None:
    with pytest.raises(InvalidImage, match=r"is not a public one.*allow_private_images"):
        fetch_image(site.url(host=host), FetchLimits(max_bytes=1 << 20))
    assert site.asked == []


@pytest.mark.parametrize(
    ("address", "public", "private"),
    [
        ("93.184.216.34", True, True),
        ("2606:2800:220:1:248:1893:25c8:1946", True, True),
        ("64:ff9b::5db8:d822", True, True),  # 93.184.216.34
        ("10.0.0.1", False, True),
        ("172.18.0.5", False, True),
        ("192.168.1.1", False, True),
        ("127.0.0.1", False, True),
        ("::1", False, True),
        ("fd00::1", False, True),
        ("::ffff:10.0.0.1", False, True),
        ("2002:7f00:1::", False, True),  # 127.0.0.1
        ("64:ff9b::a00:1", False, True),  # 10.0.0.1
        ("169.254.169.254", False, False),
        ("fe80::1", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("0.0.0.0", False, False),
        ("::", False, False),
        ("224.0.0.1", False, False),
        ("ff02::1", False, False),
        ("100.64.0.1", False, False),
    ],
)
def test_which_addresses_may_be_asked(address: str, public: bool, private: bool) -> None:
    parsed = ipaddress.ip_address(address)
    assert fetch._may_ask(parsed, allow_private=False) is public
    assert fetch._may_ask(parsed, allow_private=True) is private


def test_a_redirect_to_a_private_address_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first host is public by its name's address; the connection to it is led to the loopback server."""
    connect = socket.create_connection
    asked: list[str] = []

    def create_connection(address: tuple[str, int], timeout: float | None) -> socket.socket:
        asked.append(address[0])
        return connect(("127.0.0.1", address[1]), timeout)

    monkeypatch.setattr(socket, "create_connection", create_connection)
    names = {"public.example": ["93.184.216.34"], "inside.example": ["10.0.0.7"]}
    site.pages["/old"] = moved(site.url("/a.png", "inside.example"))
    with pytest.raises(InvalidImage, match=r"not fetched from inside\.example, whose address 10\.0\.0\.7"):
        fetch_image(site.url("/old", "public.example"), FetchLimits(1 << 20), resolve=lambda host, port: names[host])
    assert asked == ["93.184.216.34"]


def test_a_name_is_resolved_once_and_the_judged_address_is_the_one_that_is_asked(site: Site) -> None:
    """A name server that turns to another address after the check (DNS rebinding) is not asked a second time."""
    answers = [["127.0.0.1"], ["169.254.169.254"]]
    assert fetch_image(site.url(host="turning.example"), OPEN, resolve=lambda host, port: answers.pop(0)) == BYTES
    assert len(answers) == 1
    assert site.hosts[0].startswith("turning.example:")


def test_of_several_addresses_only_the_allowed_are_asked(site: Site) -> None:
    assert fetch_image(site.url(host="x.example"), OPEN, resolve=lambda *_: ["169.254.169.254", "127.0.0.1"]) == BYTES


def test_a_length_over_the_limit_is_refused_before_the_body_is_read(site: Site) -> None:
    site.pages["/big"] = page(b"", length=str(5 << 20))
    with pytest.raises(InvalidImage, match=r"larger than 1 MiB.*max_image_mib"):
        fetch_image(site.url("/big"), OPEN)


def test_a_body_over_the_limit_is_refused_whatever_was_promised(site: Site) -> None:
    def serve(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            for _ in range(64):
                request.wfile.write(bytes(1 << 18))
        except OSError:
            return
        raise AssertionError("all of it was read")

    site.pages["/endless"] = serve
    with pytest.raises(InvalidImage, match="larger than 1 MiB"):
        fetch_image(site.url("/endless"), OPEN)


def test_a_body_that_was_cut_short_is_refused(site: Site) -> None:
    site.pages["/short"] = page(b"half", length="8")
    with pytest.raises(InvalidImage, match="ended after 4 of 8 bytes"):
        fetch_image(site.url("/short"), OPEN)


@pytest.mark.parametrize("length", [None, 1000])
def test_a_server_that_drips_is_cut_off(site: Site, length: int | None) -> None:
    site.pages["/drip"] = drip(length)
    with pytest.raises(InvalidImage, match=r"not fetched within 0\.3 seconds"):
        fetch_image(site.url("/drip"), FetchLimits(1 << 20, allow_private=True, timeout_s=0.3))


def test_a_server_that_says_nothing_is_cut_off(site: Site) -> None:
    site.pages["/silent"] = lambda request: time.sleep(1)
    with pytest.raises(InvalidImage, match=r"not fetched within 0\.2 seconds"):
        fetch_image(site.url("/silent"), FetchLimits(1 << 20, allow_private=True, timeout_s=0.2))


def test_an_error_of_the_server_is_told_without_the_urls_secrets(site: Site) -> None:
    site.pages["/gone"] = page(b"", 404)
    with pytest.raises(InvalidImage, match=r"/gone could not be fetched: its server answered 404") as raised:
        fetch_image(site.url("/gone?sign=secret", host="user:secret@127.0.0.1"), OPEN)
    assert "secret" not in str(raised.value)


def test_a_port_where_nobody_listens_is_told() -> None:
    with pytest.raises(InvalidImage, match=r"could not be fetched: .*refused"):
        fetch_image("http://127.0.0.1:1/a.png", OPEN)


def test_a_name_that_does_not_exist_is_told() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(InvalidImage, match=r"could not be fetched: .*not known"):
        fetch_image("http://nobody.example/a.png", OPEN, resolve=resolve)


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "\u2488.example", "exa mple.com"])
def test_a_name_that_cannot_be_one_is_an_error_of_the_request(host: str) -> None:
    with pytest.raises(InvalidImage):
        fetch_image(f"http://{host}/a.png", OPEN, resolve=lambda *_: [])


def test_https_where_a_server_speaks_http_is_told(site: Site) -> None:
    with pytest.raises(InvalidImage, match="could not be fetched"):
        fetch_image(site.url().replace("http:", "https:"), OPEN)
