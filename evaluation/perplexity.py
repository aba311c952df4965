"""Perplexity of a language model on a real text, through the engine's own decoders.

The text is Python's language reference as the interpreter carries it for `help()` (pydoc_data.topics): half a megabyte
of English prose, tables and code by people, under the PSF licence, on every machine that runs this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.runtime.decoder import Decoder

if TYPE_CHECKING:
    from engine.runtime.cuda.decoder import PagedDecoder

CHUNK = 256  # tokens of one call
DEVICE_CHUNK = 64  # on a GPU, where each takes a slot, and decode steps of up to so many are prepared

Tokens = NDArray[np.int64]
LogitsOf = Callable[[Tokens], Iterator[NDArray[np.float32]]]
"""Logits of all tokens of a window, read from its first token on, in chunks [n, vocab]."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`losses` [windows, length - 1] are negative log likelihoods in nats, of each token after a window's first."""

    losses: NDArray[np.float64]

    @property
    def value(self) -> float:
        return math.exp(float(self.losses.mean()))

    def ratio_to(self, other: Perplexity) -> tuple[float, float | None]:
        """This perplexity over `other`'s on the same windows, and half of its 95 % interval (windows are independent).
        One window has none.

        The difference of two precisions varies far less from window to window than the text itself does.
        """
        difference = (self.losses - other.losses).mean(axis=1)
        ratio = math.exp(float(difference.mean()))
        if len(difference) == 1:
            return ratio, None
        return ratio, 1.96 * ratio * float(difference.std(ddof=1)) / math.sqrt(len(difference))


def text() -> str:
    """All topics, in the order of their names."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(tokens: Tokens, length: int, count: int) -> list[Tokens]:
    """`count` pieces of `length` tokens that do not overlap, spread evenly over the text; fewer if it is short."""
    there = len(tokens) // length
    chosen = np.linspace(0, there - 1, min(count, there)).astype(int)
    return [tokens[number * length : (number + 1) * length] for number in chosen]


def perplexity(logits_of: LogitsOf, pieces: Iterable[Tokens]) -> Perplexity:
    """Each piece is read on its own: its first token has no past and is not predicted."""
    return Perplexity(np.stack([_losses(logits_of(piece), piece) for piece in pieces]))


def _losses(chunks: Iterator[NDArray[np.float32]], tokens: Tokens) -> NDArray[np.float64]:
    losses, start = [], 0
    for logits in chunks:
        wanted = tokens[start + 1 : start + 1 + len(logits)]
        losses.append(negative_log_likelihood(logits[: len(wanted)], wanted))
        start += len(logits)
    return np.concatenate(losses)


def negative_log_likelihood(logits: NDArray[np.float32], tokens: Tokens) -> NDArray[np.float64]:
    """Nats [T] for logits [T, vocab] and the tokens that came, summed in float64."""
    peak = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - peak, dtype=np.float64).sum(axis=1))
    chosen = (logits - peak)[np.arange(len(tokens)), tokens]
    result: NDArray[np.float64] = total - chosen
    return result


def on_cpu(decoder: Decoder) -> LogitsOf:
    """Windows computed in the decoder's first row."""
    spec = decoder.spec
    no_features = np.zeros((0, spec.hidden), np.float32)

    def logits_of(tokens: Tokens) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(tokens), CHUNK):
            piece = tokens[start : start + CHUNK]
            positions = np.broadcast_to(np.arange(start, start + len(piece)), (spec.rope.axes, len(piece)))
            text_only = np.full(len(piece), -1, np.int64)
            yield decoder.prefill(0, start, piece, positions, no_features, text_only, logits="all")
        decoder.release(0)

    return logits_of


def on_cuda(decoder: PagedDecoder, block_size: int, chunk: int) -> LogitsOf:
    """Windows computed in blocks 1, 2, ..., `chunk` tokens in a call, which needs as many slots, for its rows of
    logits. One token in a call is a decode step.
    """
    from engine.runtime.cuda.step import PackedStep  # imports torch, which an engine on the CPU does without

    def logits_of(tokens: Tokens) -> Iterator[NDArray[np.float32]]:
        tables = np.arange(1, 1 - (-len(tokens) // block_size), dtype=np.int32)[None]
        for start in range(0, len(tokens), chunk):
            piece = tokens[start : start + chunk].astype(np.int32)
            rows = np.arange(len(piece), dtype=np.int32)
            step = PackedStep(
                ids=piece,
                positions=np.broadcast_to(rows + start, (decoder.spec.rope.axes, len(piece))),
                counts=np.array([len(piece)], np.int32),
                past=np.array([start], np.int32),
                tables=tables,
                logits_rows=rows,
                slots=rows,
            )
            yield decoder.run(step)[0].float().cpu().numpy()

    return logits_of
