"""What sampling remembers of one sequence."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from engine.request import SamplingParams
from engine.sampling.grammar import Matcher


class SamplerState:
    """Parameters, the tokens that penalties look at, the seed, and the number of the next draw.

    `prompt` holds the prompt's token ids; `output` the tokens committed earlier, when a sequence is restored. States of
    the same parameters, seed and tokens sample alike, whatever happened in between. Without a seed in the parameters a
    random one is drawn. `grammar` is the place of a constrained output in its grammar.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: NDArray[np.int64],
        output: Iterable[int] = (),
        *,
        grammar: Matcher | None = None,
    ) -> None:
        self.params = params
        self.grammar = grammar
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.step = 0
        seen = np.unique(prompt) if params.repetition_penalty != 1.0 else np.empty(0, np.int64)
        self._size = len(seen)
        self._tokens = np.concatenate([seen.astype(np.int64), np.zeros(32, np.int64)])
        self._counts = np.zeros(len(self._tokens), np.float32)
        self._slots = {token: slot for slot, token in enumerate(seen.tolist())}
        for token in output:
            self.commit(token)

    def commit(self, token: int) -> None:
        """Take in the token chosen at this step."""
        self.step += 1
        if self.grammar is not None:
            self.grammar.commit(token)
        if not self.params.has_penalties:
            return
        slot = self._slots.setdefault(token, self._size)
        if slot == self._size:
            if slot == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._tokens[slot] = token
            self._size += 1
        self._counts[slot] += 1

    @property
    def seen(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct tokens under penalty [n] and how often each is in the output [n]; 0 if in the prompt only."""
        return self._tokens[: self._size], self._counts[: self._size]
