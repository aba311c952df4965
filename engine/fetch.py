"""Images and videos by URL, fetched so that a request cannot make this machine ask its own network for things.

A host name is resolved once, every address it has is judged, and the connection goes to an address that was judged:
a name server that answers differently the second time (DNS rebinding) changes nothing. Redirects are followed by hand,
each judged anew. Proxies of the environment are not used, because they would resolve the name again.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from engine.config import EngineConfig
from engine.errors import InvalidImage, InvalidVideo
from engine.request import MAX_VIDEO_MIB, Image, ImageUrl, Message, Part, Video, VideoUrl

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[str]]

TIMEOUT_S = 20.0  # for all of it: name, connections, redirects, body
VIDEO_TIMEOUT_S = 60.0
MAX_REDIRECTS = 5
_REQUESTS, _IMAGES = 16, 32  # fetched beside each other
_BLOCK_BYTES = 1 << 16
_MOVED = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_HEADERS = {"User-Agent": "Tessera", "Accept": "image/*, video/*, */*;q=0.1", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """`allow_private` lets a URL lead to private and loopback addresses, never to link-local ones."""

    max_bytes: int
    allow_private: bool = False
    timeout_s: float = TIMEOUT_S
    hint: str = "send a smaller file, or raise max_image_mib"  # where a file is larger


def system_addresses(host: str, port: int) -> list[str]:
    """What the system's resolver says. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))


def fetch_image(url: str, limits: FetchLimits, *, resolve: Resolve = system_addresses) -> bytes:
    """The bytes behind an http or https URL; whether they are an image or a video is for the decoder to say.

    Raises InvalidImage with a sentence that leaves out the URL's query, which may hold a signature.
    """
    deadline = time.monotonic() + limits.timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        target = _parsed(url)
        found = _get(target, limits, deadline, resolve)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise InvalidImage(f"{_shown(target)} was redirected more than {MAX_REDIRECTS} times; give the image's own address")


def fetch_video(url: str, limits: FetchLimits) -> bytes:
    """As `fetch_image`, but for the error's class. Raises InvalidVideo."""
    try:
        return fetch_image(url, limits)
    except InvalidImage as error:
        raise InvalidVideo(str(error).replace("an image's address", "a video's address")) from error


class ImageFetcher:
    """Puts images and videos in the place of their URLs. Its threads wait for servers, so that no others have to."""

    def __init__(self, config: EngineConfig) -> None:
        allow_private = config.allow_private_images
        self._limits = FetchLimits(config.max_image_mib << 20, allow_private=allow_private)
        self._video_limits = FetchLimits(
            MAX_VIDEO_MIB << 20, allow_private=allow_private, timeout_s=VIDEO_TIMEOUT_S, hint="cut the video"
        )
        self.pool = ThreadPoolExecutor(_REQUESTS, "engine-fetch-request")  # for what calls `fetched`
        self._images = ThreadPoolExecutor(_IMAGES, "engine-fetch-image")

    def fetched(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages with an Image for every ImageUrl, a Video for every VideoUrl. Blocks.

        Raises InvalidImage or InvalidVideo for the first that fails.
        """
        parts = [part for message in messages for part in message.parts]
        images = {part.url for part in parts if isinstance(part, ImageUrl)}
        videos = {part.url for part in parts if isinstance(part, VideoUrl)}
        files: dict[tuple[type, str], Future[bytes]]
        files = {(ImageUrl, url): self._images.submit(fetch_image, url, self._limits) for url in images}
        files |= {(VideoUrl, url): self._images.submit(fetch_video, url, self._video_limits) for url in videos}

        def fetched(part: Part) -> Part:
            match part:
                case ImageUrl(url, detail):
                    return Image(files[ImageUrl, url].result(), detail)
                case VideoUrl(url):
                    return Video(files[VideoUrl, url].result())
            return part

        try:
            return tuple(replace(message, parts=tuple(map(fetched, message.parts))) for message in messages)
        finally:
            for waiting in files.values():
                waiting.cancel()

    def close(self) -> None:
        """Those under way end at their time limit."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._images.shutdown(wait=False, cancel_futures=True)


def _parsed(url: str) -> SplitResult:
    try:
        parts = urlsplit(url.strip())
        _ = parts.port  # raises for one that is no number
    except ValueError as problem:
        raise InvalidImage(f"an image's address is malformed ({problem}); give an http or https URL") from None
    if parts.scheme not in ("http", "https"):
        scheme = f"{parts.scheme}:" if parts.scheme else "no scheme"
        raise InvalidImage(f"an image's address has {scheme}; only http and https URLs are fetched")
    if not parts.hostname:
        raise InvalidImage("an image's address names no host; give a whole http or https URL")
    return parts


def _shown(target: SplitResult) -> str:
    return f"{target.scheme}://{target.hostname}{target.path}"[:300]


def _get(target: SplitResult, limits: FetchLimits, deadline: float, resolve: Resolve) -> bytes | str:
    """The body, or where the server says that it moved to."""
    name = _shown(target)
    try:
        connection = _connect(target, limits, deadline, resolve)
        with _cut_off(connection, deadline):
            connection.request("GET", _path(target), headers=_HEADERS)
            response = connection.getresponse()
            if response.status in _MOVED and (location := response.getheader("Location")):
                return location
            if response.status != http.client.OK:
                reason = f"{response.status} {response.reason}".strip()
                raise InvalidImage(f"{name} could not be fetched: its server answered {reason[:100]}")
            body = _body(response, limits, name)
            if time.monotonic() >= deadline:  # cut off, which looks like the end where no length was promised
                raise TimeoutError
            return body
    except InvalidImage:
        raise
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as problem:
        if time.monotonic() >= deadline or isinstance(problem, TimeoutError):
            raise InvalidImage(f"{name} was not fetched within {limits.timeout_s:g} seconds; try again, or send the"
                               " file itself") from problem  # fmt: skip
        reason = str(problem) or type(problem).__name__
        raise InvalidImage(f"{name} could not be fetched: {reason[:300]}") from problem


def _connect(target: SplitResult, limits: FetchLimits, deadline: float, resolve: Resolve) -> http.client.HTTPConnection:
    """A connection to the first judged address that answers. Raises InvalidImage or OSError."""
    assert target.hostname is not None, "This is a bug: the address was checked before."
    host = target.hostname if ":" in target.hostname else target.hostname.encode("idna").decode("ascii")
    port = target.port or (443 if target.scheme == "https" else 80)
    problem: OSError = OSError("its name has no address")
    for address in _judged(host, resolve(host, port), limits):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection = _Connection(host, port, timeout=left_s)
        try:
            connection.open(address, ssl.create_default_context() if target.scheme == "https" else None)
        except OSError as error:
            connection.close()
            problem = error
        else:
            return connection
    raise problem


class _Connection(http.client.HTTPConnection):
    """Speaks of `host` in headers and certificates, and connects to an address of ours."""

    def open(self, address: str, tls: ssl.SSLContext | None) -> None:
        plain = socket.create_connection((address, self.port), self.timeout)
        try:
            self.sock = plain if tls is None else tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise
        self.default_port = 80 if tls is None else 443  # which the Host header leaves out

    def connect(self) -> None:
        raise OSError("the connection ended")  # http.client would open another one, to the name


def _judged(host: str, addresses: list[str], limits: FetchLimits) -> Iterator[str]:
    """Those that may be asked. Raises InvalidImage when there are some and none may."""
    refused: list[str] = []
    allowed = 0
    for text in addresses:
        if _may_ask(ipaddress.ip_address(text), allow_private=limits.allow_private):
            allowed += 1
            yield text
        else:
            refused.append(text)
    if refused and not allowed:
        raise InvalidImage(
            f"files are not fetched from {host}, whose address {refused[0]} is not a public one; send the file itself"
            " (MULTIMODAL_SEND_FORMAT=base64), or allow private addresses in Tessera's settings (allow_private_images)"
        )


def _may_ask(address: Address, *, allow_private: bool) -> bool:
    """Whether an address is a public one (IANA's registries, as `ipaddress` has them), or a private one if allowed.

    An IPv6 address that stands for an IPv4 one is judged as that. Link-local addresses are never asked: clouds keep
    their machines' credentials there.
    """
    if isinstance(address, ipaddress.IPv6Address) and (inner := _embedded(address)) is not None:
        return _may_ask(inner, allow_private=allow_private)
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    return address.is_global or (allow_private and (address.is_private or address.is_loopback))


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)


@contextlib.contextmanager
def _cut_off(connection: http.client.HTTPConnection, deadline: float) -> Iterator[None]:
    """Close the connection at the deadline, however slowly and steadily its server drips, and at the end."""
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, [connection.sock])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        connection.close()


def _shut(connected: Any) -> None:
    with contextlib.suppress(OSError):  # closed already
        connected.shutdown(socket.SHUT_RDWR)


def _body(response: http.client.HTTPResponse, limits: FetchLimits, name: str) -> bytes:
    """Raises InvalidImage for a body over the limit, whatever its header promised, and for one that was cut short."""
    promised = response.length
    if promised is not None and promised > limits.max_bytes:
        raise _too_large(name, limits)
    blocks: list[bytes] = []
    size = 0
    while block := response.read1(_BLOCK_BYTES):
        size += len(block)
        if size > limits.max_bytes:
            raise _too_large(name, limits)
        blocks.append(block)
    if promised is not None and size < promised:
        raise OSError(f"the connection ended after {size} of {promised} bytes")
    return b"".join(blocks)


def _too_large(name: str, limits: FetchLimits) -> InvalidImage:
    return InvalidImage(
        f"{name} is larger than {limits.max_bytes >> 20} MiB, the limit for such files by URL; {limits.hint}"
    )


def _path(target: SplitResult) -> str:
    """Path and query as a request line takes them: what is escaped stays, other signs beyond ASCII become escapes."""
    path = quote(target.path or "/", safe="/%:@!$&'()*+,;=~-._")
    return f"{path}?{quote(target.query, safe="/%:@!$&'()*+,;=~-._?[]")}" if target.query else path
