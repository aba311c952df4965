"""A tokenizer for random weights: every byte is a token, and every other number has a text too."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_LETTERS = string.ascii_lowercase


def tokenizer_file(vocabulary: int, special: Mapping[str, int]) -> dict[str, Any]:
    """`tokenizer.json` of a byte-level BPE without merges.

    Prompts are as long as their text has bytes. All numbers below `vocabulary` decode to something, as a real
    vocabulary's do, because random weights choose any of them and turning tokens into text is part of a step.
    """
    numbers = iter(sorted(set(range(vocabulary)) - set(special.values())))
    entries = {_byte_character(byte): next(numbers) for byte in range(256)}
    entries |= {f"Ġ{_word(number)}": number for number in numbers}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": number, "content": text, "special": True} | flags for text, number in special.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": entries | dict(special),
            "merges": [],
        },
    }


def _byte_character(byte: int) -> str:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on."""
    if byte in _PRINTABLE:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in _PRINTABLE].index(byte))


def _word(number: int) -> str:
    """Four letters or more, another word for every number."""
    letters = ""
    while number or len(letters) < 4:
        number, digit = divmod(number, len(_LETTERS))
        letters = _LETTERS[digit] + letters
    return letters
