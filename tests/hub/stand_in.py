"""A hub on loopback that answers as Hugging Face and ModelScope do, and misbehaves when told to.

`<address>` speaks Hugging Face's API, `<address>/modelscope` ModelScope's. What is served is real: listings with sizes
and hashes, ranges, redirects to another host for large files.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
_BLOCK = 1 << 12


@dataclass
class Faults:
    """By path of a file; numbers count requests down to 0, where the fault is over."""

    breaks: dict[str, list[int]] = field(default_factory=dict)  # close after so many bytes, one for each request
    stall_s: float = 0.0  # say nothing for so long before such a close
    statuses: dict[str, list[int]] = field(default_factory=dict)  # answer with these instead
    content: dict[str, bytes] = field(default_factory=dict)  # serve other bytes than the listing announces
    no_ranges: bool = False
    wrong_ranges: bool = False
    pause_s: float = 0.0  # between blocks of 4 KiB
    refusal: str = ""  # ModelScope's way: an answer that is none, with status 200
    page: bool = False  # answer everything with a web page
    redirect: str = ""  # send files' requests to this address


@dataclass
class HubStandIn:
    repositories: dict[str, dict[str, bytes]]
    faults: Faults = field(default_factory=Faults)
    token: str = ""  # needed, when set
    gated: set[str] = field(default_factory=set)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # path with query, and headers
    address: str = ""

    def __enter__(self) -> HubStandIn:
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def modelscope(self) -> str:
        return f"{self.address}/modelscope"

    def asked(self) -> Counter[str]:
        """How often each file was asked for."""
        return Counter(name for path, _ in self.requests if (name := _file_of(path)))


def _file_of(path: str) -> str:
    parts = urlsplit(path)
    if "/resolve/" in parts.path:
        return unquote(parts.path.rpartition("/")[2])
    return parse_qs(parts.query).get("FilePath", [""])[0]


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", "tokenizer.json"))


class _Handler(BaseHTTPRequestHandler):
    stand_in: ClassVar[HubStandIn]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's signature
        pass

    def do_GET(self) -> None:
        hub = self.stand_in
        hub.requests.append((self.path, dict(self.headers)))
        if hub.faults.page:
            self._send(b"<html>Please log in</html>", "text/html")
            return
        path, query = urlsplit(self.path).path.removeprefix("/modelscope"), parse_qs(urlsplit(self.path).query)
        if path.startswith("/api/v1/models/"):
            name = "/".join(path.split("/")[4:6])
            if self._allowed(name):
                self._modelscope(name, path.endswith("/files"), query)
        elif path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if self._allowed(name):
                self._hugging_face(name, unquote(path.rpartition("/")[2]))
        else:
            name = "/".join(path.split("/")[1:3])
            if self._allowed(name):
                self._file(name, _file_of(self.path))

    def _allowed(self, name: str) -> bool:
        hub, token = self.stand_in, self.headers.get("Authorization", "").removeprefix("Bearer ")
        if (hub.token and token != hub.token) or name not in hub.repositories:
            known = name in hub.repositories
            self._refuse(401 if hub.token or not self.path.startswith("/modelscope") else 404,
                         "RepoNotFound" if not known else "")  # fmt: skip
            return False
        if name in hub.gated:
            self._refuse(403, "GatedRepo")
            return False
        return True

    def _hugging_face(self, name: str, revision: str) -> None:
        if revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
            return
        siblings = []
        for path, data in self.stand_in.repositories[name].items():
            entry: dict[str, Any] = {
                "rfilename": path,
                "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            if is_lfs(path):
                digest = hashlib.sha256(data).hexdigest()
                entry |= {"blobId": "0" * 40, "lfs": {"sha256": digest, "size": len(data), "pointerSize": 134}}
            siblings.append(entry)
        self._json({"id": name, "sha": COMMIT, "gated": False, "siblings": siblings})

    def _modelscope(self, name: str, is_listing: bool, query: dict[str, list[str]]) -> None:
        if refusal := self.stand_in.faults.refusal:
            self._json({"Code": 10010205001, "Success": False, "Data": None, "Message": refusal})
            return
        if query["Revision"] != ["master"]:
            self._refuse(404, "")
            return
        if not is_listing:
            self._file(name, query["FilePath"][0])
            return
        files: list[dict[str, Any]] = [{"Name": "onnx", "Path": "onnx", "Type": "tree", "Size": 0, "Sha256": ""}]
        for path, data in self.stand_in.repositories[name].items():
            digest = hashlib.sha256(data).hexdigest()
            files.append({"Name": path, "Path": path, "Type": "blob", "Size": len(data), "Sha256": digest})
        listing = {"Files": files, "LatestCommitter": {"Id": COMMIT}}
        self._json({"Code": 200, "Success": True, "Data": listing, "Message": ""})

    def _file(self, name: str, path: str) -> None:
        hub, faults = self.stand_in, self.stand_in.faults
        if statuses := faults.statuses.get(path):
            self._refuse(statuses.pop(0), "")
            return
        if path not in hub.repositories[name]:
            self._refuse(404, "EntryNotFound")
            return
        if faults.redirect and is_lfs(path):
            self.send_response(302)
            self.send_header("Location", faults.redirect + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._bytes(faults.content.get(path, hub.repositories[name][path]), faults.breaks.get(path))

    def _bytes(self, data: bytes, breaks: list[int] | None) -> None:
        faults, start = self.stand_in.faults, 0
        if (wanted := self.headers.get("Range")) and not faults.no_ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-")) - (10 if faults.wrong_ranges else 0)
            if start >= len(data):
                self._refuse(416, "")
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        limit = breaks.pop(0) if breaks else len(body)
        for offset in range(0, min(limit, len(body)), _BLOCK):
            try:
                self.wfile.write(body[offset : min(offset + _BLOCK, limit)])
            except OSError:
                break
            if faults.pause_s:
                time.sleep(faults.pause_s)
        if limit < len(body):
            time.sleep(faults.stall_s)
            self.close_connection = True

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
