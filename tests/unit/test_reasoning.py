"""Reasoning and answer, told apart in whole texts and in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from luthier.engine.reasoning import ReasoningStream, split_reasoning

WHOLE = [
    ("Yes.", False, None, "Yes."),
    ("<think>\nhm\n</think>\n\nYes.", False, "hm", "Yes."),
    ("\n<think>hm</think>Yes.", False, "hm", "Yes."),
    ("hm\n</think>\n\nYes.", True, "hm", "Yes."),
    ("hm and more", True, "hm and more", ""),
    ("<think>hm", False, "hm", ""),
    ("<think></think>Yes.", False, "", "Yes."),
    ("<think>a < b</think>a<b", False, "a < b", "a<b"),
    ("<think>hm</think>Say </think>.", False, "hm", "Say </think>."),
    ("Say <think>hm</think>", False, None, "Say <think>hm</think>"),
    ("<thin", False, None, "<thin"),
    ("  spaces stay ", False, None, "  spaces stay "),
]


@pytest.mark.parametrize(("text", "opened", "reasoning", "answer"), WHOLE)
def test_the_parts_of_a_text(text: str, opened: bool, reasoning: str | None, answer: str) -> None:
    assert split_reasoning(text, opened=opened) == (reasoning, answer)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", "\n", " ", "a", "é"])),
    st.booleans(),
    st.data(),
)
def test_pieces_put_together_are_the_parts(words: list[str], opened: bool, data: st.DataObject) -> None:
    text = "".join(words)
    stream, found, rest = ReasoningStream(opened=opened), ["", ""], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        for part, piece in enumerate(stream.push(rest[:size])):
            found[part] += piece
        rest = rest[size:]
    for part, piece in enumerate(stream.finish()):
        found[part] += piece
    reasoning, answer = split_reasoning(text, opened=opened)
    assert found == [reasoning or "", answer]
