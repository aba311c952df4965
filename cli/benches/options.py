"""The options that measurements have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.benches.shapes import BUNDLED, Part, shape_names
from cli.settings import add_engine_settings


def add_engine(parser: argparse.ArgumentParser) -> None:
    """For benches that drive an engine in this process, with a shape's random weights."""
    add_shape(parser)
    add_engine_settings(parser)


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Whose settings are added apart."""
    parser.add_argument("--shape", default=BUNDLED, help=f"{', '.join(shape_names())} (default: {BUNDLED})")
    parser.add_argument("--storage", type=Path, help="keep the shape's weights in this folder for the next call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def add_steps(parser: argparse.ArgumentParser, batch: str = "1,8,32") -> None:
    """For benches of the decoder."""
    parser.add_argument(
        "--batch", type=integers, default=batch, help=f"sequences at once, comma-separated (default: {batch})"
    )
    parser.add_argument(
        "--context", type=integers, default="1024", help="tokens (default: 1024; prefill: comma-separated)"
    )
    parser.add_argument("--prefill-chunk", type=int, default=2048, help="prompt tokens per step (default: 2048)")
    parser.add_argument(
        "--rotary", choices=["plain", "mrope"], default="plain", help="positions: plain (default), or Qwen-VL's three"
    )


def add_traffic(parser: argparse.ArgumentParser) -> None:
    """For benches that send requests through the plugin."""
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--requests", type=int, help="requests per row (default: enough for a few seconds)")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--image-size", type=size, default="128x128")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def add_shaped_traffic(parser: argparse.ArgumentParser) -> None:
    """For those that can do so with a shape's random weights as well."""
    add_traffic(parser)
    parser.add_argument("--shape", help=f"random weights of a shape instead of --model: {', '.join(shape_names())}")
    parser.add_argument("--storage", type=Path, help="keep the shape's weights in this folder for the next call")
    parser.add_argument("--image-format", choices=["jpeg", "png"], default="jpeg")
    parser.add_argument("--prompt-tokens", type=int, help="of a question (default: a few words; --shape: 64)")


def integers(text: str) -> list[int]:
    """Raises ValueError, which argparse reports, unless all are positive."""
    numbers = [int(word) for word in text.split(",")]
    if any(number < 1 for number in numbers):
        raise ValueError(f"{text} must be positive numbers")
    return numbers


def size(text: str) -> tuple[int, int]:
    """Pixels, width and height."""
    width, height = (int(word) for word in text.split("x"))
    return width, height


def decoder_part(arguments: argparse.Namespace) -> Part:
    return "mrope" if arguments.rotary == "mrope" else "plain"
