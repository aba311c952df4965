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

    `number` grows with arrival: the youngest sequence has the highest. `row` is its place in the runner (None while
    waiting) and `computed` the number of leading tokens whose keys and values are in the KV memory, or will be once the
    steps under way are done. `pending` tokens were chosen by such steps and are not known yet. Prefill computes the
    first `prefill_end` tokens, decode steps the rest. `features` holds what stands for each image, [tokens, hidden],
    as the runner keeps it; None until computed.
    """

    number: int
    prompt: Prompt
    images: tuple[ImageInput, ...]
    features: list[Any]
    sampler: SamplerState
    max_tokens: int  # of output
    owner: Any = None  # the engine's record of the request; the scheduler never looks at it
    output: list[int] = field(default_factory=list)
    pending: int = 0
    row: int | None = None
    computed: int = 0
    prefill_end: int = 0
    pauses: tuple[int, ...] = ()  # numbers of tokens after which prefill stops, for the KV cache to keep what is there
    reused: int = 0
    ended: bool = False
    admitted_at: float = 0.0  # time.monotonic() of its first admission; 0 before
    _hashes: list[bytes] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and output, the pending ones included."""
        return len(self.prompt.token_ids) + len(self.output) + self.pending

    @property
    def known(self) -> int:
        """Tokens of prompt and output whose ids the host has."""
        return len(self.prompt.token_ids) + len(self.output)

    @property
    def is_prefilling(self) -> bool:
        return self.computed < self.prefill_end

    @property
    def is_decoding(self) -> bool:
        """What prefill computes is in the KV memory, and there is a next token to compute.

        After a set-back that may be an early one of the output: see `Scheduler`. A sequence that will have all its
        tokens once the steps under way are done is not decoding any more.
        """
        chosen = len(self.output) + self.pending
        after_prompt = self.computed - len(self.prompt.token_ids)
        return self.computed >= self.prefill_end and after_prompt < chosen < self.max_tokens

    def next_token(self, pending: int) -> int:
        """The output token that the next decode step computes; `pending` for one that is not known yet."""
        place = self.computed - len(self.prompt.token_ids)
        return self.output[place] if place < len(self.output) else pending

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token ids [stop - start] of prompt and output together."""
        prompt = self.prompt.token_ids
        output = np.asarray(self.output[max(0, start - len(prompt)) : max(0, stop - len(prompt))], np.int64)
        return np.concatenate([prompt[start:stop], output])

    def positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rotary positions [axes, stop - start] of prompt and output together."""
        prompt = self.prompt.positions[:, start:stop]
        first = max(start, len(self.prompt.token_ids))
        output = np.arange(first, max(first, stop)) + self.prompt.position_delta
        return np.concatenate([prompt, np.broadcast_to(output, (len(prompt), len(output)))], axis=1)

    def missing_images(self) -> list[int]:
        """Images that tokens not yet computed stand for and whose features are not there."""
        spans = enumerate(self.prompt.image_spans)
        return [index for index, span in spans if span.stop > self.computed and self.features[index] is None]

    def block_hashes(self, block: int) -> list[bytes]:
        """One digest per full block of tokens, each covering everything before it, images by content."""
        full = self.known // block
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
        self.row, self.computed, self.prefill_end, self.reused, self.pauses = None, 0, 0, 0, ()
