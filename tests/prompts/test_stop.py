"""Stop words, however the text is cut into pieces."""

from __future__ import annotations

import random

import pytest

from engine.prompts import StopMatcher


def run(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stop)
    out, stopped = "", False
    for piece in pieces:
        emitted, stopped = matcher.push(piece)
        out += emitted
        if stopped:
            return out, True
    return out + matcher.flush(), stopped


@pytest.mark.parametrize(
    ("stop", "text", "wanted"),
    [
        (("END",), "abc END def", ("abc ", True)),
        (("END",), "abc EN", ("abc EN", False)),
        (("END", "c"), "abc END", ("ab", True)),
        (("aab",), "aaaab!", ("aa", True)),
        (("abab", "bac"), "ababac", ("", True)),
        (("abcd", "bc"), "xabcd", ("xa", True)),
        (("cd", "abcd"), "xabcd", ("x", True)),
        (("\n\n",), "a\n\nb", ("a", True)),
        (("🦜",), "a🦜", ("a", True)),
        ((), "anything", ("anything", False)),
    ],
)
def test_text_ends_before_the_stop_word_that_is_complete_first(
    stop: tuple[str, ...], text: str, wanted: tuple[str, bool]
) -> None:
    assert run(stop, [text]) == wanted
    assert run(stop, list(text)) == wanted
    assert run(stop, ["", text[:3], "", text[3:]]) == wanted


def test_only_what_may_become_a_stop_word_is_held_back() -> None:
    matcher = StopMatcher(("stop", "top hat"))
    assert matcher.push("a sto") == ("a ", False)
    assert matcher.push("r") == ("stor", False)
    assert matcher.push("e stop") == ("e ", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_flush_gives_back_what_was_held() -> None:
    matcher = StopMatcher(("</answer>",))
    assert matcher.push("yes</ans") == ("yes", False)
    assert matcher.flush() == "</ans"


def test_random_texts_and_cuts_agree_with_a_plain_search() -> None:
    chance = random.Random(3)
    for _ in range(500):
        text = "".join(chance.choices("ab", k=30))
        stop = tuple("".join(chance.choices("ab", k=chance.randint(1, 7))) for _ in range(chance.randint(1, 4)))
        cuts = sorted(chance.choices(range(31), k=6))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, 30], strict=True)]
        ends = [end for end in range(31) if any(text[:end].endswith(word) for word in stop)]
        if ends:
            longest = max(len(word) for word in stop if text[: ends[0]].endswith(word))
            wanted = (text[: ends[0] - longest], True)
        else:
            wanted = (text, False)
        assert run(stop, pieces) == wanted
