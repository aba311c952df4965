"""Draws the pictures of README.md: what commands print, as they print it here, in a terminal's window.

    python -m tools.terminal_pictures

Each command runs in a home folder of its own, which is shown as ~, and in this repository, shown as ~/tessera.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "_assets"
PICTURES = {
    "terminal_ask": (
        './tessera ask samples/red_circle.png "what shape is in the image?"',
        './tessera ask samples/printed_word.jpg "read the word"',
    ),
    "terminal_doctor": ("./tessera doctor",),
    "terminal_list": ("./tessera list",),
}
_WIDTH = 120  # characters
_FONTS = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)  # which would be fetched from somewhere


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        printed("./tessera ask hello", Path(home))  # converts the demo model, which the first call alone waits for
        for name, commands in PICTURES.items():
            text = "\n\n".join(f"$ {command}\n{printed(command, Path(home))}" for command in commands)
            (FOLDER / f"{name}.svg").write_text(picture(name, text), encoding="utf-8")


def printed(command: str, home: Path) -> str:
    """What a command of ./tessera prints, on stdout and stderr as they come. Raises CalledProcessError."""
    words = [sys.executable, "-m", "cli", *shlex.split(command)[1:]]
    environment = os.environ | {"HOME": str(home)}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    return done.stdout.replace(str(home), "~").replace(str(ROOT), "~/tessera").rstrip()


def picture(name: str, text: str) -> str:
    """An SVG that needs nothing from elsewhere; `name` keeps its styles apart from another's on the same page."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=_WIDTH, file=nowhere, force_terminal=True, highlight=False)
        console.print(text, markup=False, emoji=False)
    return console.export_svg(title="", code_format=_FONTS.sub("", CONSOLE_SVG_FORMAT), unique_id=name)


if __name__ == "__main__":
    main()
