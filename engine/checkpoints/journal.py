"""Which weights of a conversion are written already, so that one that was killed goes on instead of starting over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import xxhash

from engine.checkpoints.artifact import TensorEntry

_HASH_BLOCK_BYTES = 8 * 2**20


class Journal:
    """A line for each weight beside the weights' file; the first line names what is converted."""

    def __init__(self, file: Path, digest: str) -> None:
        self._file = file
        self._digest = digest

    def recover(self, weights: BinaryIO) -> list[list[TensorEntry]]:
        """The entries, weight by weight, up to the first whose bytes in `weights` do not hold; forgets the others.

        The system may have lost what a process wrote before a power failure, so nothing is believed unread.
        """
        done: list[list[TensorEntry]] = []
        for entries in self._read():
            if not all(_holds(weights, entry) for entry in entries):
                break
            done.append(entries)
        lines = [json.dumps(self._digest), *map(_line, done)]
        self._file.write_text("\n".join(lines) + "\n")
        return done

    def add(self, entries: Sequence[TensorEntry]) -> None:
        """The bytes of these tensors have been written."""
        with self._file.open("a") as stream:
            stream.write(_line(entries) + "\n")

    def _read(self) -> list[list[TensorEntry]]:
        """What can be read; a line that a kill cut short ends it."""
        found: list[list[TensorEntry]] = []
        try:
            first, *lines = self._file.read_text().splitlines()
            if json.loads(first) != self._digest:
                return []
            for line in lines:
                tensors = json.loads(line)
                found.append([TensorEntry(**tensor | {"shape": tuple(tensor["shape"])}) for tensor in tensors])
        except (OSError, ValueError, TypeError, KeyError):
            return found
        return found


def _line(entries: Sequence[TensorEntry]) -> str:
    return json.dumps([dataclasses.asdict(entry) for entry in entries])


def _holds(weights: BinaryIO, entry: TensorEntry) -> bool:
    weights.seek(entry.offset)
    checksum, left = xxhash.xxh3_64(), entry.nbytes
    while left > 0 and (block := weights.read(min(left, _HASH_BLOCK_BYTES))):
        checksum.update(block)
        left -= len(block)
    return left == 0 and checksum.hexdigest() == entry.xxh3
