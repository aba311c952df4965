"""The README's pictures of terminals: what commands printed, and nothing that is fetched or runs."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tools import terminal_pictures

ROOT = Path(__file__).resolve().parents[2]


def shown(svg: str) -> str:
    """The text of a picture, line by line."""
    lines = re.findall(r'<text class="[^"]*-r\d+"[^>]*>(.*?)</text>', svg)
    return "\n".join(html.unescape(line).replace("\xa0", " ") for line in lines)


def test_a_picture_shows_the_text_as_it_is() -> None:
    svg = terminal_pictures.picture("one", "$ ./tessera ask\n[bold] <b> & :smile: 12 'x'\n  ümläut 你好")
    assert shown(svg).splitlines() == ["$ ./tessera ask", "[bold] <b> & :smile: 12 'x'", "  ümläut 你好"]


@pytest.mark.parametrize("name", terminal_pictures.PICTURES)
def test_pictures_show_their_commands_and_need_nothing_else(name: str) -> None:
    svg = (ROOT / "_assets" / f"{name}.svg").read_text(encoding="utf-8")
    for command in terminal_pictures.PICTURES[name]:
        assert f"$ {command}" in shown(svg)
    assert "Traceback" not in svg
    kinds = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
    assert kinds <= {"svg", "style", "defs", "clipPath", "rect", "g", "circle", "text"}
    assert not re.search(r"url\((?!#)|@import|href", svg)


@pytest.mark.parametrize("page", ["README.md", "readme/README_zh_Hans.md"])
def test_the_readmes_show_them(page: str) -> None:
    found = set(re.findall(r"_assets/(\w+)\.svg", (ROOT / page).read_text(encoding="utf-8")))
    assert found == set(terminal_pictures.PICTURES)
