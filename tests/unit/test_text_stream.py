"""Streamed text is the text of the whole answer, cut where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from luthier.engine.text import TextStream


def decode(ids: Sequence[int]) -> str:
    """Bytes, as a byte-level tokenizer has them."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(text: str, stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(decode, stop)
    return [*(stream.push(byte) for byte in text.encode()), stream.finish()]


def test_a_character_comes_whole() -> None:
    assert pieces("aé\N{GRINNING FACE}") == ["a", "", "é", "", "", "", "\N{GRINNING FACE}", ""]


def test_a_stop_string_is_never_shown_in_part() -> None:
    assert pieces("one STOP two", ["STOP"]) == ["o", "n", "e", " ", *[""] * 9]
    assert "".join(pieces("STOLEN", ["STOP"])) == "STOLEN"


def test_bytes_that_are_no_text_are_shown_at_the_end() -> None:
    stream = TextStream(decode)
    assert [stream.push(0xE2), stream.push(0x82), stream.finish()] == ["", "", "\N{REPLACEMENT CHARACTER}"]


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_the_pieces_are_the_text(text: str, stop: list[str]) -> None:
    ends = [text.index(word) for word in stop if word in text]
    assert "".join(pieces(text, stop)) == text[: min([len(text), *ends])]


@pytest.mark.parametrize("stop", [["ab", "b"], ["b", "ab"]])
def test_of_two_stop_strings_the_first_to_begin_ends_the_text(stop: list[str]) -> None:
    assert "".join(pieces("xxab", stop)) == "xx"
