"""The unit of work: one prompt being computed and continued."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.preprocess import ImageInput
from engine.prompts import Prompt
from engine.sampling import SamplerState


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt, its output so far, and how much of both is in the KV memory.

    `number` grows with arrival: the youngest sequence has the highest. `row` is the KV row (None while waiting) and
    `computed` the number of leading tokens whose keys and values are in it; both are set by the scheduler.
    `features` holds one float32 [tokens, hidden] array per image, None until computed.
    """

    number: int
    prompt: Prompt
    images: tuple[ImageInput, ...]
    features: list[NDArray[np.float32] | None]
    sampler: SamplerState
    owner: Any = None  # the engine's record of the request; the scheduler never looks at it
    output: list[int] = field(default_factory=list)
    row: int | None = None
    computed: int = 0
    reused: int = 0
    _hashes: list[bytes] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt.token_ids) + len(self.output)

    @property
    def is_decoding(self) -> bool:
        """The prompt is in the KV memory, and the next token to compute is one of the output's.

        After a set-back that is an early one: output is computed by decode steps again, as it was the first time,
        because prefill sums in another order and the last bits would differ.
        """
        return bool(self.output) and self.computed >= len(self.prompt.token_ids)

    @property
    def wants_token(self) -> bool:
        """Everything is computed: the logits that came last choose the next token."""
        return self.computed == self.length

    @property
    def next_token(self) -> int:
        """The output token that the next decode step computes."""
        return self.output[self.computed - len(self.prompt.token_ids)]

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token ids [stop - start] of prompt and output together."""
        prompt = self.prompt.token_ids
        output = np.asarray(self.output[max(0, start - len(prompt)) : max(0, stop - len(prompt))], np.int64)
        return np.concatenate([prompt[start:stop], output])

    def missing_images(self) -> list[int]:
        """Images that tokens not yet computed stand for and whose features are not there."""
        spans = enumerate(self.prompt.image_spans)
        return [index for index, span in spans if span.stop > self.computed and self.features[index] is None]

    def block_hashes(self, block: int) -> list[bytes]:
        """One digest per full block of tokens, each covering everything before it, images by content."""
        full = self.length // block
        digest = self._hashes[-1] if self._hashes else b""
        for index in range(len(self._hashes), full):
            start, stop = index * block, (index + 1) * block
            hasher = hashlib.blake2b(digest, digest_size=16)
            hasher.update(self.tokens(start, stop).tobytes())
            for span in self.prompt.image_spans:
                if span.start < stop and span.stop > start:
                    hasher.update(span.key + (start - span.start).to_bytes(8, "little", signed=True))
            digest = hasher.digest()
            self._hashes.append(digest)
        return self._hashes[:full]

    def set_back(self) -> None:
        """Forget the KV memory; prompt and output so far are computed again after the next admission."""
        self.row, self.computed, self.reused = None, 0, 0
