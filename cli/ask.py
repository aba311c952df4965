"""Ask about images and videos as a user of Dify does: a plugin process, the daemon's protocol, a streamed answer."""

from __future__ import annotations

import argparse
import base64
import mimetypes
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.daemon import Daemon, PluginCrashed, PluginError, RequestTimeout, Session
from cli.settings import add_settings, settings_from
from engine.errors import InvalidConfig

ROOT = Path(__file__).resolve().parent.parent
mimetypes.add_type("video/x-matroska", ".mkv")  # which Python learns of from the system, where that knows it
FROM_CACHE = "tessera/answer-cache"  # models/llm/llm.py


class Unreadable(Exception):
    """A file named on the command line cannot be read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="images and videos; none for text alone")
    parser.add_argument("question", help="what to ask, in quotes")
    parser.add_argument("--model", default="demo", help="a name, owner/name, or a checkpoint's folder (default: demo)")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", help="end the answer before this text; may be repeated")
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """The answer goes to stdout, everything else to stderr. 1 for an error, which is one sentence."""
    try:
        messages = prompt_messages(args.files, args.question, args.system)
        with Daemon(ROOT, credentials=settings_from(args)) as daemon:
            _note(f"plugin ready after {daemon.wait_until_ready():.2f} s")
            session = daemon.invoke_llm(messages, _parameters(args), model=_model(args.model), stop=args.stop)
            _print_answer(session)
    except (PluginError, PluginCrashed, RequestTimeout, InvalidConfig, Unreadable) as error:
        print(f"tessera: {error}", file=sys.stderr)
        return 1
    return 0


def _model(name: str) -> str:
    """As the plugin takes it: a folder by its whole path, because the plugin does not know where its user is."""
    return str(Path(name).absolute()) if (Path(name) / "config.json").is_file() else name


def prompt_messages(files: Sequence[Path], question: str, system: str | None = None) -> list[dict[str, Any]]:
    """Dify's prompt messages: images and videos first, as Dify sends them. Raises Unreadable."""
    content = [*map(_file_content, files), {"type": "text", "data": question}]
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": content}]


def _file_content(path: Path) -> dict[str, Any]:
    """What is not a video by its name is sent as an image, for the plugin to judge."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
    mime_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return {
        "type": "video" if mime_type.startswith("video/") else "image",
        "format": path.suffix.removeprefix(".").lower(),
        "mime_type": mime_type,
        "base64_data": base64.b64encode(data).decode(),
        "filename": path.name,
    }


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
    given = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
    return {name: value for name, value in given.items() if value is not None}


def _print_answer(session: Session) -> None:
    first_s: float | None = None
    chunk: dict[str, Any] = {}
    for chunk in session:
        if text := chunk["delta"]["message"]["content"]:
            first_s = first_s or time.perf_counter() - session.sent_at
            print(text, end="", flush=True)
    print()
    usage, total_s = chunk["delta"]["usage"], time.perf_counter() - session.sent_at
    source = ", from the answer cache" if chunk["system_fingerprint"] == FROM_CACHE else ""
    _note(
        f"first token after {first_s or total_s:.2f} s, all after {total_s:.2f} s{source}; "
        f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out ({chunk['delta']['finish_reason']})"
    )


def _note(text: str) -> None:
    print(f"tessera: {text}", file=sys.stderr)
