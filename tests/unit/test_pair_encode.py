"""Pairs and labelled answers -> samples with branches: targets, what is too long, what is lost."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from luthier.data.encode import EncodeOptions, share_room
from luthier.data.pairs import feedback_sample, pair_sample
from luthier.recipe.schema import DataSpec
from luthier.types import (
    Conversation,
    DataError,
    Encoded,
    EncodedConversation,
    Lost,
    Message,
    Row,
    Sample,
    Span,
)
from tests.words import END, NEWLINE, Words

PROMPT = [101, 1, 2, END, NEWLINE, 102]
ASKED = (("user", "a bb"),)


def options(**changes: Any) -> EncodeOptions:
    return EncodeOptions(**({"max_length": 1000, "overflow": "drop"} | changes))


def talk(*messages: tuple[str, str] | Message) -> Conversation:
    return Conversation(tuple(m if isinstance(m, Message) else Message(*m) for m in messages))


def pair(
    chosen: str | Message, rejected: str | Message, *before: tuple[str, str], margin: float | None = None
) -> Row:
    sides = [
        answer if isinstance(answer, Message) else Message("assistant", answer)
        for answer in (chosen, rejected)
    ]
    better, worse = (talk(*(before or ASKED), side) for side in sides)
    return Row("demo", 5, better, rejected=worse, margin=margin)


def feedback(answer: str | Message, desirable: bool = True, *before: tuple[str, str]) -> Row:
    message = answer if isinstance(answer, Message) else Message("assistant", answer)
    return Row("demo", 5, talk(*(before or ASKED), message), desirable=desirable)


def parts(sample: Sample) -> list[list[int]]:
    """The prompt and the branches."""
    bounds = [0, *sample.branches, len(sample)]
    return [sample.input_ids[a:b].tolist() for a, b in pairwise(bounds)]


def only(encoded: Encoded) -> Sample:
    (sample,) = encoded.samples
    return sample


# --------------------------------------------------------------------------------------------------
# Targets and labels


def test_a_pair_is_a_prompt_and_two_answers_with_their_stop_tokens() -> None:
    sample = only(pair_sample(pair("ccc", "dddd eeeee"), Words(), options()))
    assert sample.input_ids.tolist() == [*PROMPT, 3, END, 4, 5, END]
    assert sample.weights.tolist() == [0] * 6 + [1] * 5
    assert sample.branches == (6, 8)
    assert (sample.source, sample.index) == ("demo", 5)
    assert sample.input_ids.dtype == np.int32 and sample.weights.dtype == np.float32
    assert math.isnan(sample.label)


def test_margins_are_labels() -> None:
    for margin in (0.0, 1.5):
        sample = only(pair_sample(pair("ccc", "dddd", margin=margin), Words(), options()))
        assert sample.label == margin


def test_earlier_answers_are_context() -> None:
    before = (("user", "a"), ("assistant", "bb"), ("user", "ccc"))
    sample = only(pair_sample(pair("dddd", "eeeee", *before), Words(), options()))
    prompt = [101, 1, END, NEWLINE, 102, 2, END, NEWLINE, 101, 3, END, NEWLINE, 102]
    assert parts(sample) == [prompt, [4, END], [5, END]]
    assert sample.weights.tolist() == [0] * 13 + [1] * 4


def test_what_follows_the_stop_token_is_learnt_where_the_recipe_says_so() -> None:
    sample = only(pair_sample(pair("ccc", "dddd"), Words(), options(train_after_stop=True)))
    assert parts(sample) == [PROMPT, [3, END, NEWLINE], [4, END, NEWLINE]]
    assert sample.weights.tolist() == [0] * 6 + [1] * 6


def test_answers_have_their_messages_weights() -> None:
    row = pair(Message("assistant", "ccc", weight=0.5), Message("assistant", "dddd", weight=2))
    sample = only(pair_sample(row, Words(), options()))
    assert sample.weights.tolist() == [0] * 6 + [0.5, 0.5, 2, 2]
    nothing = pair("ccc", Message("assistant", "dddd", weight=0))
    assert pair_sample(nothing, Words(), options()) == Encoded(lost=Lost("answer has weight 0"))


def test_feedback_is_one_branch_with_a_label() -> None:
    for desirable, label in [(True, 1.0), (False, 0.0)]:
        sample = only(feedback_sample(feedback("ccc", desirable), Words(), options()))
        assert parts(sample) == [PROMPT, [3, END]]
        assert sample.weights.tolist() == [0] * 6 + [1, 1]
        assert (sample.branches, sample.label) == ((6,), label)
        assert (sample.source, sample.index) == ("demo", 5)


def test_a_pair_gives_two_samples_of_feedback() -> None:
    encoded = feedback_sample(pair("ccc", "dddd eeeee"), Words(), options())
    assert [parts(sample) for sample in encoded.samples] == [
        [PROMPT, [3, END]],
        [PROMPT, [4, 5, END]],
    ]
    assert [sample.label for sample in encoded.samples] == [1.0, 0.0]
    assert [sample.index for sample in encoded.samples] == [5, 5]
    assert encoded.lost == Lost()


# --------------------------------------------------------------------------------------------------
# Rows that cannot be used


def differing() -> Row:
    return Row(
        "demo", 5, talk(("user", "a"), ("assistant", "b")), rejected=talk(("user", "aa"), ("assistant", "c"))
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair("ccc dd", "ccc dd"), "chosen and rejected are the same"),
        (pair("ccc", ""), "empty answer"),
        (pair(" \n", "ccc"), "empty answer"),
        (pair(Message("user", "ccc"), "dddd"), "does not end with an answer"),
        (pair("ccc", Message("tool", "dddd")), "does not end with an answer"),
        (differing(), "prompts of chosen and rejected differ"),
        (pair("ccc", "dddd", ("narrator", "a")), "unknown role"),
        (Row("demo", 5, talk(), rejected=talk()), "does not end with an answer"),
    ],
)
def test_pairs_that_are_dropped(row: Row, reason: str) -> None:
    assert pair_sample(row, Words(), options()) == Encoded(lost=Lost(reason))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (feedback(""), "empty answer"),
        (feedback(Message("user", "ccc")), "does not end with an answer"),
        (pair("ccc", "ccc"), "chosen and rejected are the same"),
        (pair("ccc", ""), "empty answer"),
    ],
)
def test_feedback_that_is_dropped(row: Row, reason: str) -> None:
    assert feedback_sample(row, Words(), options()) == Encoded(lost=Lost(reason))


def test_an_answer_needs_a_prompt() -> None:
    class Bare(Words):
        """Shows the answers alone."""

        def encode(self, conversation: Conversation) -> EncodedConversation:
            shown = super().encode(Conversation(conversation.messages[-1:]))
            (span,) = shown.answers
            answers = (Span(0, span.stop - 1, len(conversation.messages) - 1, span.end - 1),)
            return EncodedConversation(shown.ids[1:], answers)

    assert pair_sample(pair("ccc", "dddd"), Bare(), options()) == Encoded(lost=Lost("no prompt"))


def test_rows_of_another_kind_and_broken_templates_are_errors_with_a_place() -> None:
    with pytest.raises(DataError, match=r"^demo, row 5: a pair of answers was expected$"):
        pair_sample(feedback("ccc"), Words(), options())
    with pytest.raises(DataError, match=r"^demo, row 5: an answer with a label was expected$"):
        feedback_sample(Row("demo", 5, talk(*ASKED, ("assistant", "b"))), Words(), options())

    class Broken(Words):
        def encode(self, conversation: Conversation) -> EncodedConversation:
            raise DataError("the stop token is not supervised")

    for encode, row in ((pair_sample, pair("b", "c")), (feedback_sample, feedback("b"))):
        with pytest.raises(DataError, match=r"^demo, row 5: the stop token is not supervised$"):
            encode(row, Broken(), options())


def test_llamafactory_keeps_equal_and_empty_answers_and_drops_roles_that_do_not_alternate() -> None:
    foreign = options(llamafactory=True)
    assert parts(only(pair_sample(pair("ccc", "ccc"), Words(), foreign))) == [PROMPT, [3, END], [3, END]]
    assert parts(only(pair_sample(pair("ccc", ""), Words(), foreign))) == [PROMPT, [3, END], [END]]
    assert pair_sample(pair("b", "cc", ("user", "a"), ("user", "a")), Words(), foreign) == Encoded(
        lost=Lost("roles do not alternate")
    )
    # there an answer without text stands for the other label
    for desirable in (True, False):
        assert only(feedback_sample(feedback("", desirable), Words(), foreign)).label == 0.0
    assert only(feedback_sample(feedback("b", True), Words(), foreign)).label == 1.0


# --------------------------------------------------------------------------------------------------
# max_length


LONG = pair("ccc", "dddd eeeee ffffff")
"""A prompt of 6 tokens, answers of 2 and 4."""


def test_the_prompt_with_the_longer_answer_has_to_fit() -> None:
    assert len(only(pair_sample(LONG, Words(), options(max_length=10)))) == 12
    assert pair_sample(LONG, Words(), options(max_length=9)) == Encoded(lost=Lost("longer than max_length"))
    message = r"^demo, row 5: 10 tokens, more than data.max_length \(9\); raise it, or choose data.overflow: drop or truncate$"
    for encode in (pair_sample, feedback_sample):
        with pytest.raises(DataError, match=message):
            encode(LONG, Words(), options(max_length=9, overflow="error"))


@pytest.mark.parametrize(
    ("limit", "expected", "lost"),
    [
        (9, [[1, 2, END, NEWLINE, 102], [3, END], [4, 5, 6, END]], 1),
        (6, [[NEWLINE, 102], [3, END], [4, 5, 6, END]], 4),
        (5, [[102], [3, END], [4, 5, 6, END]], 5),
        (4, [[102], [3, END], [4, 5, 6]], 6),
        (3, [[102], [3, END], [4, 5]], 7),
        (2, [[102], [3], [4]], 9),
    ],
)
def test_truncation_cuts_the_oldest_of_the_prompt_before_the_answers_ends(
    limit: int, expected: list[list[int]], lost: int
) -> None:
    encoded = pair_sample(LONG, Words(), options(max_length=limit, overflow="truncate"))
    assert parts(only(encoded)) == expected
    assert only(encoded).weights.tolist() == [0.0] * len(expected[0]) + [1.0] * sum(map(len, expected[1:]))
    assert encoded.lost == Lost(tokens=lost)


def test_answers_that_are_the_same_once_they_are_cut() -> None:
    row = pair("dddd eeeee", "dddd eeeee ffffff")
    truncate = options(max_length=3, overflow="truncate")
    assert pair_sample(row, Words(), truncate) == Encoded(
        lost=Lost("chosen and rejected are the same within max_length")
    )
    foreign = options(max_length=3, overflow="truncate", llamafactory=True)
    assert len(pair_sample(row, Words(), foreign).samples) == 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(2, 60))
def test_llamafactory_divides_the_room_with_the_longer_answer(a: int, b: int, c: int, limit: int) -> None:
    row = pair("xx " * b, "yyy " * c, ("user", "z " * a))
    foreign = options(max_length=limit, overflow="truncate", llamafactory=True, train_after_stop=True)
    encoded = pair_sample(row, Words(), foreign)
    prompt, chosen, rejected = (
        [101, *[1] * a, END, NEWLINE, 102],
        [*[2] * b, END, NEWLINE],
        [*[3] * c, END, NEWLINE],
    )
    source, target = share_room(len(prompt), max(len(chosen), len(rejected)), limit)
    kept = [prompt[:source], chosen[:target], rejected[:target]]
    assert parts(only(encoded)) == kept
    gone = len(prompt + chosen + rejected) - sum(map(len, kept))
    assert encoded.lost == Lost(tokens=gone, answers=0 if target else 2)


def test_feedback_is_cut_by_its_own_length() -> None:
    truncate = options(max_length=6, overflow="truncate")
    encoded = feedback_sample(LONG, Words(), truncate)
    assert [parts(sample) for sample in encoded.samples] == [
        [[2, END, NEWLINE, 102], [3, END]],
        [[NEWLINE, 102], [4, 5, 6, END]],
    ]
    assert encoded.lost == Lost(tokens=2 + 4)
    foreign = options(max_length=8, overflow="truncate", llamafactory=True)
    # 2 x 4 tokens are not below 8, 2 x 6 are not either: int(8 x 4 / 10) = 3 of the answer, 5 of the prompt
    row = feedback("dddd eeeee ffffff")
    assert parts(only(feedback_sample(row, Words(), foreign))) == [PROMPT[:5], [4, 5, 6]]


def test_a_pair_whose_worse_answer_is_too_long_is_dropped_whole() -> None:
    dropped = Encoded(lost=Lost("longer than max_length"))
    assert feedback_sample(LONG, Words(), options(max_length=9)) == dropped


# --------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("stage", ["rm", "dpo", "kto"])
def test_options_of_a_recipe(stage: str) -> None:
    made = EncodeOptions.of(DataSpec(max_length=64, train_after_stop=True), stage)
    assert (made.max_length, made.overflow, made.train_after_stop) == (64, "drop", True)
    assert EncodeOptions.of(DataSpec(overflow="truncate"), stage).overflow == "truncate"
