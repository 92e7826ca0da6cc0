"""Samples token by token: every token visible, learnt ones marked with and without colours, nothing interpreted."""

from __future__ import annotations

import io
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from luthier.check.text import MOST_TOKENS, sample_text
from luthier.check.tokens import ShownAnswer, ShownSample, Token, chosen, show_sample, token_text, visible
from luthier.data.template import ChatTemplate
from luthier.show import example_text
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


def pair_of(template: ChatTemplate, prompt: str, *answers: str, label: float = math.nan) -> Sample:
    parts = [template.text(text) for text in (prompt, *answers)]
    ends = np.cumsum([len(part) for part in parts])
    weights = np.concatenate([np.full(len(part), float(place > 0)) for place, part in enumerate(parts)])
    ids = np.concatenate(parts)
    return Sample(
        ids.astype(np.int32), weights.astype(np.float32), "pairs", 3, tuple(ends[:-1].tolist()), label
    )


def test_a_prompt_stands_once_and_each_answer_under_its_name(template: ChatTemplate) -> None:
    sample = pair_of(template, "ab\n", "yes", "n[o]")
    shown = show_sample(sample, template)
    assert shown_text(shown).splitlines() == [
        "  pairs, row 3: a prompt of 3 tokens, answers in ⟦ ⟧",
        "a|b|↵",
        "  chosen, 3 tokens",
        "⟦y|e|s⟧",
        "  rejected, 4 tokens",
        "⟦n|[|o|]⟧",
    ]
    tree = json.loads(json.dumps(shown.to_dict()))
    assert [token["text"] for token in tree["tokens"]] == ["a", "b", "↵"]
    assert [(answer["name"], answer["learnt"]) for answer in tree["answers"]] == [
        ("chosen", 3),
        ("rejected", 4),
    ]
    assert tree["learnt"] == shown.learnt == 7
    plain = Text.from_markup(example_text(sample, template.decode)).plain
    assert plain.splitlines() == [
        "example (pairs, row 3): a prompt of 3 tokens, answers in ⟦ ⟧",
        "ab",
        "chosen, 3 tokens:",
        "⟦yes⟧",
        "rejected, 4 tokens:",
        "⟦n[o]⟧",
    ]


@pytest.mark.parametrize(("label", "name"), [(1.0, "desirable"), (0.0, "undesirable")])
def test_an_answer_with_a_label_is_called_by_it(template: ChatTemplate, label: float, name: str) -> None:
    shown = show_sample(pair_of(template, "a", "bc", label=label), template)
    assert [answer.name for answer in shown.answers] == [name]


def test_of_long_answers_beginning_and_end_are_shown() -> None:
    def tokens(letter: str, number: int) -> tuple[Token, ...]:
        return tuple(Token(i, f"{letter}{i}", 1.0) for i in range(number))

    answers = (ShownAnswer("chosen", tokens("c", MOST_TOKENS)), ShownAnswer("rejected", tokens("r", 5)))
    text = shown_text(ShownSample("rows", 0, tokens("p", 10), answers))
    seen = re.findall(r"c\d+", text.replace("chosen", ""))
    assert seen[0] == "c0"
    assert seen[-1] == f"c{MOST_TOKENS - 1}"
    assert abs(len(seen) - MOST_TOKENS // 3) <= 1
    assert f"… {MOST_TOKENS - len(seen)} more tokens …" in text
    assert len(re.findall(r"r\d", text.split("rejected")[1])) == 5


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
