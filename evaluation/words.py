"""The words that training may see and the words that it must not.

Source: the English dictionary of the package trdg 1.8.0. A word belongs to one side by a hash of its lower-case
letters, so that no order of files, seed or letter case can move it to the other.
"""

import hashlib
import random
import re
from functools import cache
from typing import Literal

from evaluation.samples import package_folder

Split = Literal["train", "test"]
SHORTEST, LONGEST = 3, 12
TEST_SHARE = 20
"""One word in this many is kept for evaluation."""


def split_of(word: str) -> Split:
    """The side a word is on, whatever its case; random letters count as words."""
    digest = hashlib.sha256(word.lower().encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % TEST_SHARE == 0 else "train"


@cache
def words(split: Split) -> tuple[str, ...]:
    """The dictionary's words of 3 to 12 letters a-z on one side, in lower case, sorted."""
    dictionary = package_folder("trdg", "--no-deps trdg==1.8.0") / "dicts" / "en.txt"
    lines = dictionary.read_text(encoding="utf-8").splitlines()
    spelled = {line.lower() for line in lines if re.fullmatch(f"[A-Za-z]{{{SHORTEST},{LONGEST}}}", line)}
    return tuple(sorted(word for word in spelled if split_of(word) == split))


def in_some_case(word: str, rng: random.Random) -> str:
    """The word in lower case, as a title, in capitals, or with the case of every letter drawn."""
    draw = rng.random()
    if draw < 0.45:
        return word.lower()
    if draw < 0.72:
        return word.title()
    if draw < 0.92:
        return word.upper()
    return "".join(rng.choice((letter.lower(), letter.upper())) for letter in word)
