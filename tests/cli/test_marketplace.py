"""The rules of Dify's marketplace, held against the built package.

From langgenius/dify-plugins: docs/plugin-submission-requirements.md and .github/workflows/pre-check-plugin.yaml, and
from what Dify's daemon checks when it decodes a package.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from cli import package

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
BLOCKED_PARTS = {
    ".git", ".venv", "venv", "env", "__pycache__", ".ruff_cache", ".mypy_cache", ".pytest_cache", ".idea", ".vscode",
    "build", "dist", "node_modules", ".DS_Store", "Thumbs.db",
}  # fmt: skip
BLOCKED_SUFFIXES = {
    ".pyc", ".pyo", ".pyd", ".so", ".dll", ".exe", ".dylib", ".key", ".pem", ".p12", ".log", ".tmp", ".bin", ".sh",
    ".whl", ".zip", ".gz", ".tar", ".7z", ".sqlite", ".db",
}  # fmt: skip
BINARIES = (b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe", b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xca\xfe\xba\xbe")
SECRETS = re.compile(rb"hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|gh[pousr]_[A-Za-z0-9]{36}")
HOSTS = ("github.com", "gitlab.com", "bitbucket.org", "gitee.com", "codeberg.org", "git.sr.ht")
START_S = 20.0
HEAVY = {"torch", "transformers", "onnxruntime", "numpy", "triton"}
REFUSED_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
REFUSED_MODULES = {"pickle", "marshal", "shelve", "importlib", "requests", "multiprocessing", "pty"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marketplace")
    built = package.build(ROOT, folder / "tessera.difypkg")
    assert built.path.stat().st_size <= 50 * MIB
    zipfile.ZipFile(built.path).extractall(folder / "plugin")
    return folder / "plugin"


@pytest.fixture(scope="module")
def files(unpacked: Path) -> dict[PurePosixPath, bytes]:
    found = (path for path in unpacked.rglob("*") if path.is_file())
    return {PurePosixPath(path.relative_to(unpacked).as_posix()): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def manifest(unpacked: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((unpacked / "manifest.yaml").read_text(encoding="utf-8"))
    return loaded


def text(unpacked: Path, name: str) -> str:
    return (unpacked / name).read_text(encoding="utf-8")


def test_it_is_small_enough_packed_and_unpacked(files: dict[PurePosixPath, bytes]) -> None:
    assert sum(map(len, files.values())) <= 50 * MIB
    assert len(files) <= 5000


def test_it_holds_no_development_state_no_archives_and_no_binaries(files: dict[PurePosixPath, bytes]) -> None:
    for name, data in files.items():
        assert not set(name.parts) & BLOCKED_PARTS, name
        assert not name.name.startswith(".env"), name
        assert name.suffix.lower() not in BLOCKED_SUFFIXES, name
        assert not data.startswith(BINARIES), name


def test_it_holds_no_secrets(files: dict[PurePosixPath, bytes]) -> None:
    assert not [name for name, data in files.items() if SECRETS.search(data)]


def test_paths_are_plain(unpacked: Path) -> None:
    names = zipfile.ZipFile(unpacked.parent / "tessera.difypkg").namelist()
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./-]*", name) and ".." not in name for name in names)


def test_the_manifest_has_what_the_daemon_demands(manifest: dict[str, Any]) -> None:
    assert manifest["type"] == "plugin"
    assert re.fullmatch(r"[a-z0-9_-]{1,64}", manifest["author"])
    assert re.fullmatch(r"[a-z0-9_-]{1,128}", manifest["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", manifest["version"])
    assert set(manifest["plugins"]) == {"models"}  # a model provider must not be anything else beside it
    assert manifest["meta"]["runner"] == {"language": "python", "version": "3.12", "entrypoint": "main"}
    assert set(manifest["meta"]["arch"]) <= {"amd64", "arm64"}
    assert manifest["resource"]["memory"] > 0
    assert datetime.datetime.fromisoformat(manifest["created_at"]).tzinfo is not None
    for field in ("label", "description"):
        assert manifest[field]["en_US"]


def test_the_manifest_has_what_the_marketplace_demands(manifest: dict[str, Any], unpacked: Path) -> None:
    assert not re.search("dify|langgenius", manifest["author"])
    assert re.fullmatch(rf"https://({'|'.join(map(re.escape, HOSTS))})/[\w.-]+/[\w.-]+", manifest["repo"])
    assert (unpacked / manifest["privacy"]).is_file()
    Version(manifest["meta"]["minimum_dify_version"])
    assert set(manifest["tags"]) <= {"agent", "image", "other", "productivity", "rag", "utilities", "videos"}


def test_the_hosts_that_it_asks_by_itself_are_declared(manifest: dict[str, Any], unpacked: Path) -> None:
    provider = yaml.safe_load(text(unpacked, "provider/tessera.yaml"))
    fields = provider["provider_credential_schema"]["credential_form_schemas"]
    (endpoint,) = (field["placeholder"]["en_US"] for field in fields if field["variable"] == "hub_endpoint")
    assert endpoint.removeprefix("https://") in manifest["network"]["domains"]


def test_icons_are_drawings_of_our_own_that_run_nothing(manifest: dict[str, Any], unpacked: Path) -> None:
    for key in ("icon", "icon_dark"):
        tree = ElementTree.parse(unpacked / "_assets" / manifest[key])
        kinds = {element.tag.rpartition("}")[2] for element in tree.iter()}
        assert kinds <= {"svg", "title", "rect", "path", "circle", "g", "defs", "linearGradient", "stop"}, key
        assert "rect" in kinds or "path" in kinds


def test_the_sdk_reads_manifest_form_and_models(unpacked: Path) -> None:
    """As the plugin does when it starts, in the package's folder."""
    script = "from dify_plugin.core.plugin_registration import PluginRegistration as R; from dify_plugin import *\n"
    script += "R(DifyPluginEnv())"
    done = subprocess.run([sys.executable, "-c", script], cwd=unpacked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_readme_is_english_and_says_what_reviewers_look_for(manifest: dict[str, Any], unpacked: Path) -> None:
    readme = text(unpacked, "README.md")
    assert not re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", readme)
    assert manifest["repo"] in readme
    for words in ("## In Dify", "Setup", "## Settings", "**Credentials and connections:**", "## Limits", "## Security"):
        assert words in readme, words
    assert (unpacked / "readme" / "README_zh_Hans.md").is_file()


def test_every_sensitive_capability_is_in_the_readme(unpacked: Path) -> None:
    security = text(unpacked, "README.md").partition("## Security")[2].partition("\n## ")[0]
    for words in ("Processes it starts", "URL", "PRIVACY.md", "Folders"):
        assert words in security, words


def test_the_readme_shows_its_first_command_on_the_first_screen(unpacked: Path) -> None:
    lines = text(unpacked, "README.md").splitlines()
    assert any("./tessera ask" in line for line in lines[:24])
    assert any(line.startswith("## In Dify") for line in lines[:24])


def test_operators_find_what_keeps_installations_from_working(unpacked: Path) -> None:
    operators = text(unpacked, "README.md").partition("## For operators")[2].partition("\n## ")[0]
    block = re.search(r"```yaml\n(.*?)```", operators, re.DOTALL)
    assert block
    daemon = yaml.safe_load(block[1])["services"]["plugin_daemon"]
    assert daemon["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    for words in ("PYTHON_ENV_INIT_TIMEOUT", "INSTALL_METHOD=remote", "PIP_MIRROR_URL", "cleanup", "doctor"):
        assert words in operators, words


def test_the_privacy_policy_is_a_real_text(unpacked: Path) -> None:
    policy = text(unpacked, "PRIVACY.md")
    assert len(policy) > 1500
    for heading in ("What leaves the machine", "What is processed", "What is stored", "How to delete it", "Contact"):
        assert f"## {heading}" in policy
    assert re.search(r"https://\S+/issues|\S+@\S+\.\w+", policy.partition("## Contact")[2])
    assert not re.search("TODO|lorem|TBD", policy, re.IGNORECASE)


def test_requirements_are_pinned_and_come_from_an_index(unpacked: Path) -> None:
    lines = [line for line in text(unpacked, "requirements.txt").splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert all(requirement.url is None for requirement in requirements)
    assert all([clause.operator for clause in requirement.specifier] == ["=="] for requirement in requirements)
    pins = {requirement.name: next(iter(requirement.specifier)).version for requirement in requirements}
    assert Version(pins["dify-plugin"]) >= Version("0.9.0")
    assert not (unpacked / "pyproject.toml").exists()  # Dify would prefer its ranges


def test_the_code_does_nothing_that_review_refuses(unpacked: Path) -> None:
    for path in unpacked.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in REFUSED_CALLS, (path, node.lineno)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert ast.unparse(node.func) not in REFUSED_CALLS, (path, node.lineno)
                assert not [word for word in node.keywords if word.arg == "shell"], (path, node.lineno)
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
                assert not {name.partition(".")[0] for name in names} & REFUSED_MODULES, (path, node.lineno)


# Run before anything else in the plugin's process: no line leaves the machine, and what is imported is written down.
WATCH = """
import json, os, sys
def watch(event, arguments):
    if event == "socket.connect":
        host = arguments[1][0] if isinstance(arguments[1], tuple) else "unix"
        if host not in ("127.0.0.1", "::1", "unix"):
            report("connect", host)
            raise OSError("no network here")
    elif event == "socket.getaddrinfo" and arguments[0] not in (None, "127.0.0.1", "localhost", "::1"):
        report("resolve", arguments[0])
        raise OSError("no network here")
    elif event == "import":
        report("import", arguments[0])
def report(*what):
    os.write(log, (json.dumps(what) + "\\n").encode())
log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(watch)
"""


@contextlib.contextmanager
def serverless(plugin: Path, port: int, watched: Path) -> Iterator[subprocess.Popen[str]]:
    site = watched / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WATCH)
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"INSTALL_METHOD": "serverless", "SERVERLESS_PORT": str(port), "SERVERLESS_HOST": "127.0.0.1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(site), "WATCH_LOG": str(watched / "log")}
    process = subprocess.Popen(
        [sys.executable, "-m", "main"],
        cwd=plugin,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def answered(url: str, deadline: float) -> str:
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return str(response.read().decode())
        except OSError:
            assert time.monotonic() < deadline, f"no answer within {START_S:g} seconds"
            time.sleep(0.05)


def test_the_install_test_passes_without_gpu_and_network(unpacked: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deadline = time.monotonic() + START_S
    with serverless(unpacked, port, tmp_path) as process:
        assert process.stdout
        assert any("Serving Flask app" in line for line in iter(process.stdout.readline, ""))
        assert answered(f"http://127.0.0.1:{port}/health", deadline) == "OK"
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [what for what in events if what[0] in ("connect", "resolve")] == []
    imported = {name.partition(".")[0] for kind, name in events if kind == "import"}
    assert "dify_plugin" in imported  # the watch was there
    assert not imported & HEAVY
