"""Constrained decoding: which tokens may come next, so that the output fits a JSON schema.

llguidance (Earley parser over lexemes, derivatives of regular expressions) makes the masks. It needs nothing but numpy,
compiles a schema in about a millisecond, and refuses the keywords that it does not enforce.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidParameter
from engine.prompts.tokenizer import Tokenizer
from engine.sampling.numerals import Numerals, leading_digits
from engine.sampling.schema import read_schema

Words = NDArray[np.int32]
"""Masks: a bit per token, 32 to a word, the first token lowest."""

MOST_THREADS = 8
KEPT = 64  # compiled schemas per model: a workflow's node sends the same one each time
# Between tokens of JSON: nothing, a space, or a new line and its indent. Unbounded, a weak model would never go on.
_WHITESPACE = r"( |\n {0,8})?"
_FEW = 16  # up to a share of 1 / 16 places are written one by one
_NARROW = 3  # with less room than this for digits it matters how many a token has
# What a string may hold, by length. Where a slice fits whole, the mask takes its tokens at once; only of the others are
# the texts looked at one by one. llguidance's own are 10, 30 and any length: with less room than 10 in a string, that
# is half a millisecond and more for a vocabulary of 150,000.
_SLICES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30)
_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
_BLANKS = r"[\x20\x0A\x0D\x09]+"


class Matcher:
    """One sequence's place in its grammar. Used by one thread at a time."""

    def __init__(self, state: llguidance.LLMatcher, vocabulary: Vocabulary) -> None:
        self.state = state
        self.vocabulary = vocabulary
        self._numerals = Numerals()
        self.problem = ""  # why nothing can follow, once that was asked and is so

    def refine(self, words: Words) -> None:
        """Take out of the grammar's mask [words] what makes a number too long, and all where the grammar gave up."""
        if self.state.is_error():
            words.fill(0)
        elif (room := self._numerals.room) < _NARROW:
            shorter = words & self.vocabulary.at_most_digits[max(0, room)]
            if shorter.any():
                words[:] = shorter

    def find_problem(self) -> None:
        """No token was chosen here: says in `problem` why, unless the grammar allows some."""
        nothing = not masks([self]).any()
        if self.state.is_error():
            self.problem = f"the JSON schema is too complex: {_sentence(self.state.get_error())}"
        elif nothing:
            self.problem = "no token of the model's vocabulary can go on with the JSON that the schema asks for here"

    def commit(self, token: int) -> None:
        """Take in the token that was chosen; after the end of the grammar, nothing."""
        if not self.state.is_stopped():
            self.state.consume_token(token)
            self._numerals.push(self.vocabulary.token_bytes(token))


class Vocabulary:
    """A model's tokens as grammars see them. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos: Sequence[int]) -> None:
        size = max(vocab, tokenizer.size)
        ends = [token for token in eos if token < size]
        if not ends:
            raise InvalidParameter(
                "JSON cannot be asked of this model: its files name no token that ends a text and is in the vocabulary;"
                " set eos_token_id in its generation_config.json"
            )
        slices = [_BLANKS, *(f"{_CHARACTER}{{1,{length}}}" for length in _SLICES), f"{_CHARACTER}+"]
        self._tokens = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=ends, slices=slices)
        self.words = -(-size // 32)
        starts = np.array([leading_digits(self.token_bytes(token)) for token in range(tokenizer.size)])
        digits = np.pad(starts, (0, 32 * self.words - len(starts)))
        self.at_most_digits = [_mask(digits <= count) for count in range(_NARROW)]
        """Masks of the tokens that do not begin with more than 0, 1 and 2 digits."""

    def compile(self, schema: str) -> llguidance.LLMatcher:
        """Raises InvalidParameter for what is no JSON schema, and for one with keywords that are not enforced."""
        narrowed = read_schema(schema)
        options: llguidance._lib.JsonCompileOptions = {"whitespace_pattern": _WHITESPACE, "lenient": False}
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(narrowed, overrides=options)
        except ValueError as problem:
            raise InvalidParameter(f"the JSON schema cannot be used: {_sentence(str(problem))}") from None
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidParameter(f"the JSON schema cannot be used: {_sentence(matcher.get_error())}")
        return matcher

    def token_bytes(self, token: int) -> bytes:
        return self._tokens.decode_bytes([token])


class Grammars:
    """A model's compiled schemas. Thread-safe; the vocabulary is read when the first is asked for: up to a second.

    Every matcher starts as a copy of what was compiled.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos: Sequence[int]) -> None:
        self._source = (tokenizer, vocab, eos)
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, schema: str | None) -> Matcher | None:
        """At the start of an output; None for free text. Raises InvalidParameter."""
        if schema is None:
            return None
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(*self._source)
            vocabulary, compiled = self._vocabulary, self._compiled.get(schema)
        if compiled is None:
            compiled = vocabulary.compile(schema)
        with self._lock:
            self._compiled[schema] = compiled
            self._compiled.move_to_end(schema)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), vocabulary)


def masks(matchers: Sequence[Matcher], out: Words | None = None) -> Words:
    """What may come next in each of one model's sequences, [n, words], in `out`; nothing where the grammar gave up."""
    words = np.empty((len(matchers), matchers[0].vocabulary.words), np.int32) if out is None else out
    if len(matchers) == 1:
        matchers[0].state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    else:
        places = [(matcher.state, row) for row, matcher in enumerate(matchers)]
        _executor().unsafe_compute_mask_ptr(places, words.ctypes.data, words.strides[0], len(words))
    for row, matcher in enumerate(matchers):
        matcher.refine(words[row])
    return words


def constrain(logits: NDArray[np.float32], matchers: Mapping[int, Matcher]) -> None:
    """Set what may not come next to minus infinity, in place, in the rows of logits [B, V] that have a matcher."""
    for row, words in zip(matchers, masks(list(matchers.values())), strict=True):
        _forbid(logits[row], words)


def _mask(allowed: NDArray[np.bool_]) -> Words:
    return np.packbits(allowed, bitorder="little").view(np.int32)


def _forbid(values: NDArray[np.float32], words: Words) -> None:
    """Minus infinity where the mask has no bit. Mostly few tokens are allowed, or in a text few are not."""
    allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(values)].view(np.bool_)
    count = np.count_nonzero(allowed)
    if count < len(values) // _FEW:
        places = np.flatnonzero(allowed)
        kept = values[places]
        values.fill(-np.inf)
        values[places] = kept
    elif count > len(values) - len(values) // _FEW:
        values[np.flatnonzero(~allowed)] = -np.inf
    else:
        np.copyto(values, -np.inf, where=~allowed)


@functools.cache
def _executor() -> llguidance.LLExecutor:
    """Threads for the masks of several sequences; idle, they sleep."""
    return llguidance.LLExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0))))


def _sentence(message: str) -> str:
    """What the library says, without its own state; advice that speaks of the library's options is replaced."""
    if message.startswith("oneOf constraints are not supported"):
        return "alternatives of a oneOf overlap, which cannot be held to; use anyOf"
    return message.strip().partition("\n<state>")[0][:500]
