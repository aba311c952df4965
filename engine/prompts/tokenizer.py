"""The checkpoint's tokenizer.

Reads tokenizer.json with the `tokenizers` library, which is what transformers' own classes run on: importing those
costs seconds and half a gigabyte (they import torch), so they are used only for folders that have no tokenizer.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from engine.errors import CheckpointError

_FILE = "tokenizer.json"
_OTHER_FILES = ("vocab.json", "tokenizer.model")


class Tokenizer:
    """Thread-safe: nothing of it changes after construction but caches of constants."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        control = {token_id: str(token.content) for token_id, token in added.items() if token.special}
        self.is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._special = frozenset(control)
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        self._size = 1 + max([*vocabulary.values(), *added], default=-1)
        self.longest = max(map(len, vocabulary), default=1)  # characters that one token of text can stand for
        self._bytes: dict[int, bytes] = {}
        # Longest first: of two tokens that begin alike, the tokenizer takes the longer one.
        spellings = sorted(control.values(), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises CheckpointError, naming the file that is missing or malformed."""
        path = folder / _FILE
        if not path.is_file():
            return cls(_convert(folder))
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception for any malformed file
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text become themselves, none are added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def prefix(self) -> list[int]:
        """What the tokenizer itself puts before any text (a beginning-of-sequence token, or nothing)."""
        return self._tokenizer.encode("", add_special_tokens=True).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def size(self) -> int:
        """Tokens, added ones included; ids may have holes below it."""
        return self._size

    def to_json(self) -> str:
        """What `tokenizer.json` holds."""
        return self._tokenizer.to_str()

    def token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def control_starts(self, text: str) -> list[int]:
        """Where special tokens begin in a text, overlapping ones included."""
        starts = []
        match = self._control.search(text)
        while match is not None:
            starts.append(match.start())
            match = self._control.search(text, match.start() + 1)
        return starts

    def token_bytes(self, token_id: int) -> bytes:
        """What a token of a byte-level vocabulary stands for; nothing for special and unknown tokens."""
        found = self._bytes.get(token_id)
        if found is None:
            token = "" if self.is_special(token_id) else self._tokenizer.id_to_token(token_id) or ""
            found = self._bytes[token_id] = _to_bytes(token)
        return found


def _to_bytes(token: str) -> bytes:
    """GPT-2's byte alphabet back to bytes; a token with any other character is plain text."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """Printable bytes stand for themselves, the others for the characters from 256 on (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _convert(folder: Path) -> tokenizers.Tokenizer:
    if not any((folder / name).is_file() for name in _OTHER_FILES):
        raise CheckpointError(f"{folder} has no {_FILE}; copy it from the model's home")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return loaded.backend_tokenizer
    except Exception as error:  # converters raise whatever the file makes them
        raise CheckpointError(f"{folder} has no {_FILE}, and converting its other files failed: {error}") from error


def special_tokens(folder: Path) -> dict[str, str]:
    """Names that chat templates know (bos_token, eos_token, ...) from tokenizer_config.json, empty when it is absent.

    Raises CheckpointError when the file is malformed.
    """
    config = read_json(folder / "tokenizer_config.json")
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in config.items()
        if name.endswith("_token") and (isinstance(token, str) or (isinstance(token, dict) and "content" in token))
    }


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty when the file is absent. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; it must hold a JSON object")
    return value
