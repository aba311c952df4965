"""What a repository holds: the two hubs' answers as one list of files with sizes and hashes.

Hugging Face: `GET /api/models/{repository}/revision/{revision}?blobs=true`, and files from
`/{repository}/resolve/{commit}/`; a file in LFS has its sha256, another one its git blob's sha1. ModelScope: `GET
/api/v1/models/{repository}/repo/files?Revision=..&Recursive=true`, and files from `/api/v1/models/{repository}/repo`;
every file has its sha256. (As huggingface_hub 1.33 and modelscope's hub/api.py speak to them.)
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from engine.catalog import MAIN, Repository
from engine.describe import CONFIG
from engine.errors import DownloadFailed

TIMEOUT = httpx.Timeout(30.0, connect=10.0)
MAX_REDIRECTS = 5
_MODELSCOPE_MAIN = "master"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file; `hash_name` is sha256 of the bytes, or blob: the sha1 that git gives them. `digest` is hex."""

    path: str
    size: int
    hash_name: str
    digest: str
    url: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one revision; `revision` is the commit where the hub tells it."""

    repository: str
    revision: str
    files: Mapping[str, RemoteFile]


def speaks_modelscope(endpoint: str) -> bool:
    """ModelScope's address, or a mirror's that says so (https://mirror.example/modelscope)."""
    return "modelscope" in endpoint.lower()


def open_client(endpoint: str, token: str) -> httpx.Client:
    """For one download. Redirects to another host get no token: httpx takes its header off."""
    headers = {"User-Agent": "tessera", "Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
        if speaks_modelscope(endpoint):
            headers["Cookie"] = f"m_session_id={token}"
    return httpx.Client(
        headers=headers, timeout=TIMEOUT, follow_redirects=True, max_redirects=MAX_REDIRECTS, verify=_trusted()
    )


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Reading the certificates takes a fifth of a second."""
    return httpx.create_ssl_context()


def list_files(client: httpx.Client, endpoint: str, repository: Repository) -> Snapshot:
    """Of a repository that holds a checkpoint.

    Raises DownloadFailed with a sentence for the form, and httpx.TransportError when the hub is out of reach.
    """
    endpoint = endpoint.rstrip("/")
    name = repository.on(modelscope=speaks_modelscope(endpoint))
    list_all = _modelscope if speaks_modelscope(endpoint) else _hugging_face
    snapshot = list_all(client, endpoint, name, repository.revision)
    if CONFIG not in snapshot.files:
        raise DownloadFailed(f"{snapshot.repository} has no {CONFIG}; it is no checkpoint in Hugging Face layout")
    return snapshot


def _hugging_face(client: httpx.Client, endpoint: str, name: str, revision: str) -> Snapshot:
    answer = _json(client, f"{endpoint}/api/models/{name}/revision/{quote(revision, safe='')}", {"blobs": "true"}, name)
    try:
        commit = str(answer["sha"])
        files = [_sibling(entry, f"{endpoint}/{name}/resolve/{commit}") for entry in answer["siblings"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(endpoint, error) from error
    return Snapshot(name, commit, {file.path: file for file in files if file is not None})


def _sibling(entry: Mapping[str, Any], base: str) -> RemoteFile | None:
    path, lfs = str(entry["rfilename"]), entry.get("lfs")
    if not _is_flat(path):
        return None
    hashed = ("sha256", str(lfs["sha256"])) if lfs else ("blob", str(entry["blobId"]))
    size = lfs["size"] if lfs else entry["size"]
    return RemoteFile(path, int(size), *hashed, url=f"{base}/{quote(path)}")


def _modelscope(client: httpx.Client, endpoint: str, name: str, revision: str) -> Snapshot:
    wanted = _MODELSCOPE_MAIN if revision == MAIN else revision
    base = f"{endpoint}/api/v1/models/{name}/repo"
    answer = _json(client, f"{base}/files", {"Revision": wanted, "Recursive": "true"}, name)
    if answer.get("Success") is False:
        raise DownloadFailed(f"{urlsplit(endpoint).netloc} refuses {name}: {str(answer.get('Message'))[:300]}")
    try:
        data = answer["Data"]
        commit = str((data.get("LatestCommitter") or {}).get("Id") or wanted)
        files = [_modelscope_file(entry, base, wanted) for entry in data["Files"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(endpoint, error) from error
    return Snapshot(name, commit, {file.path: file for file in files if file is not None})


def _modelscope_file(entry: Mapping[str, Any], base: str, revision: str) -> RemoteFile | None:
    path = str(entry["Path"])
    if entry.get("Type") == "tree" or not _is_flat(path):
        return None
    url = f"{base}?Revision={quote(revision, safe='')}&FilePath={quote(path, safe='')}"
    return RemoteFile(path, int(entry["Size"]), "sha256", str(entry["Sha256"]), url)


def _is_flat(path: str) -> bool:
    """Everything that is needed lies at the top; a name that could leave the folder is never written."""
    return bool(path) and "/" not in path and "\\" not in path and not path.startswith(".")


def _json(client: httpx.Client, url: str, query: Mapping[str, str], name: str) -> dict[str, Any]:
    response = client.get(url, params=query)
    require_success(response, name)
    try:
        value = response.json()
    except ValueError as error:
        raise _malformed(url, error) from error
    if not isinstance(value, dict):
        raise _malformed(url, TypeError("not an object"))
    return value


def require_success(response: httpx.Response, name: str) -> None:
    """Raises DownloadFailed for what asking again does not change, httpx.TransportError for the rest."""
    if response.is_success:
        return
    if response.status_code in (408, 429) or response.status_code >= 500:
        raise httpx.TransportError(f"the hub answered {response.status_code}")
    error = response.headers.get("X-Error-Code", "")
    host = response.history[0].url.host if response.history else response.url.host
    raise DownloadFailed(_refusal(response.status_code, error, name, host))


def _refusal(status: int, error: str, name: str, host: str) -> str:
    if error == "GatedRepo" or status == 403:
        return (
            f"{name} is gated at {host}: accept its licence on the model's page there, and put a token of that account"
            " into the form (hub_token)"
        )
    if status == 401:
        return (
            f"{host} does not show {name} to this token, or to nobody without one: check the spelling, or put a token"
            " that may read it into the form (hub_token)"
        )
    if status == 404:
        what = "has no such revision of" if error == "RevisionNotFound" else "has no model, or not this file of,"
        return f"{host} {what} {name}; check the spelling, or copy its folder to storage/models by hand"
    return f"{host} answered {status} for {name}; check hub_endpoint in the form"


def _malformed(endpoint: str, error: Exception) -> DownloadFailed:
    host = urlsplit(endpoint).netloc
    return DownloadFailed(f"{host} does not answer as a hub does ({error}); check hub_endpoint in the form")
