"""Samples token by token: every token visible, learnt ones marked with and without colours, nothing interpreted."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from luthier.check.text import MOST_TOKENS, sample_text
from luthier.check.tokens import ShownSample, Token, chosen, show_sample, token_text, visible
from luthier.data.template import ChatTemplate
from luthier.types import Sample
from tests.tiny import chat_tokenizer


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(chat_tokenizer())


def shown_text(sample: ShownSample, *, colours: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, soft_wrap=True, emoji=False, force_terminal=colours).print(
        sample_text(sample), highlight=False
    )
    return out.getvalue()


def sample_of(template: ChatTemplate, text: str, learnt: slice) -> Sample:
    ids = np.asarray(template.text(text), np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[learnt] = 1
    return Sample(ids, weights, "rows", 7)


def test_a_token_is_shown_as_its_text(template: ChatTemplate) -> None:
    (letter,) = template.text("a")
    assert token_text(letter, template) == "a"
    assert token_text(template.tokenizer.convert_tokens_to_ids("<|im_end|>"), template) == "<|im_end|>"
    (blank,) = template.text(" ")
    assert token_text(blank, template) == " "


def test_bytes_of_a_character_are_shown_as_bytes(template: ChatTemplate) -> None:
    texts = [token_text(token, template) for token in template.text("é世")]
    assert texts == ["<C3>", "<A9>", "<E4>", "<B8>", "<96>"]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\nb", "a↵b"),
        ("\r\n\t", "␍↵⇥"),
        ("\x1b[31m", "<U+001B>[31m"),
        ("a\u200bb\u202e", "a<U+200B>b<U+202E>"),
        ("世 é", "世 é"),
    ],
)
def test_what_would_not_be_seen_is_spelled(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_a_first_token_is_never_learnt(template: ChatTemplate) -> None:
    shown = show_sample(sample_of(template, "abcd", slice(0, 2)), template)
    assert [token.weight for token in shown.tokens] == [0, 1, 0, 0]
    assert shown.learnt == 1
    tree = json.loads(json.dumps(shown.to_dict()))
    assert [token["learnt"] for token in tree["tokens"]] == [False, True, False, False]
    assert (tree["dataset"], tree["row"], tree["learnt"]) == ("rows", 7, 1)
    assert [token["text"] for token in tree["tokens"]] == list("abcd")


def test_learnt_tokens_stand_in_brackets_without_colours(template: ChatTemplate) -> None:
    text = shown_text(show_sample(sample_of(template, "ab cd\ne", slice(3, 5)), template))
    assert text.splitlines() == ["  rows, row 7: 2 of 7 tokens are learnt, in ⟦ ⟧", "a|b| |⟦c|d⟧|↵", "|e"]


def test_colours_add_nothing_but_colours(template: ChatTemplate) -> None:
    shown = show_sample(sample_of(template, "a [bold]x[/] :smile: b", slice(4, 9)), template)
    coloured = shown_text(shown, colours=True)
    assert "\x1b[1;32m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == shown_text(shown)
    assert "".join(token.text for token in shown.tokens) == "a [bold]x[/] :smile: b"
    assert shown_text(shown).replace("|", "").replace("⟦", "").replace("⟧", "").splitlines()[1] == (
        "a [bold]x[/] :smile: b"
    )


def test_a_weight_is_named(template: ChatTemplate) -> None:
    tokens = (Token(1, "a", 0.0), Token(2, "b", 0.5), Token(3, "c", 1.0))
    assert shown_text(ShownSample("rows", 0, tokens)).splitlines()[1] == "a|⟦b⟧×0.5|⟦c⟧"


def test_of_a_long_sample_beginning_and_end_are_shown() -> None:
    tokens = tuple(Token(i, f"t{i}", 0.0) for i in range(MOST_TOKENS + 100))
    text = shown_text(ShownSample("rows", 0, tokens))
    seen = re.findall(r"t\d+", text)
    assert seen[0] == "t0"
    assert seen[-1] == f"t{MOST_TOKENS + 99}"
    assert f"… {len(tokens) - len(seen)} more tokens …" in text
    assert abs(len(seen) - MOST_TOKENS) <= 1


@pytest.mark.parametrize(("number", "expected"), [(3, [0, 3, 6]), (1, [0]), (0, []), (99, list(range(10)))])
def test_chosen_samples_lie_evenly(number: int, expected: list[int]) -> None:
    samples: list[Any] = [Sample(np.zeros(1, np.int32), np.zeros(1, np.float32), "x", i) for i in range(10)]
    assert [sample.index for sample in chosen(samples, number)] == expected
