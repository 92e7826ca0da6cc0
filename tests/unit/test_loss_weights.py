"""Weights of messages and of parts of their text, token by token."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.formats import to_row
from luthier.data.pairs import pair_sample
from luthier.data.read import RawRow
from luthier.data.registry import DEFAULT_COLUMNS, DEFAULT_TAGS, DatasetAttr
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, DataError, Encoded, Message, Row
from tests.tiny import chat_tokenizer
from tests.tiny_tokenizers import byte_level, metaspace

OPENAI = DatasetAttr(
    "demo", "file", "", formatting="openai", columns=DEFAULT_COLUMNS["openai"], tags=DEFAULT_TAGS["openai"]
)
CHATML = chat_tokenizer().chat_template
TOKENS = ("<|im_start|>", "<|im_end|>")


def row(*turns: dict[str, Any]) -> Row:
    return to_row(RawRow(0, "demo, row 0", {"messages": list(turns)}), OPENAI, "conversation")


def user(text: str, **said: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **said}


def answer(text: str, **said: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **said}


def characters() -> ChatTemplate:
    """One token for every ASCII character."""
    return load_template(chat_tokenizer(), DataSpec())


def options(**changes: Any) -> EncodeOptions:
    return EncodeOptions(**({"max_length": 1000, "overflow": "drop"} | changes))


def learnt(encoded: Encoded, template: ChatTemplate) -> list[tuple[str, float]]:
    """Runs of targets with one weight, as text."""
    runs: list[tuple[list[int], float]] = []
    for sample in encoded.samples:
        before = 0.0
        for token, weight in zip(sample.input_ids.tolist(), sample.weights.tolist(), strict=True):
            if weight and weight == before:
                runs[-1][0].append(token)
            elif weight:
                runs.append(([token], weight))
            before = weight
    return [(template.decode(ids), weight) for ids, weight in runs]


def weigh(*turns: dict[str, Any], **changes: Any) -> list[tuple[str, float]]:
    template = characters()
    return learnt(sft_sample(row(*turns), template, options(**changes)), template)


def test_weights_of_messages() -> None:
    turns = user("a"), answer("one", weight=0.5), user("b"), answer("two")
    assert weigh(*turns) == [("one<|im_end|>", 0.5), ("two<|im_end|>", 1.0)]
    for off in ({"weight": 0}, {"train": False}, {"loss": False}, {"loss": 0.0}):
        assert weigh(user("a"), answer("one", **off), user("b"), answer("two")) == [("two<|im_end|>", 1.0)]
    assert weigh(user("a"), answer("one", train=True, weight=1)) == [("one<|im_end|>", 1.0)]
    assert weigh(*turns, mask_history=True) == [("two<|im_end|>", 1.0)]


def test_questions_and_tool_results_are_learnt_only_where_they_have_a_weight() -> None:
    turns = user("ask"), answer("call"), {"role": "tool", "content": "ask"}, answer("so")
    answers = [("call<|im_end|>", 1.0), ("so<|im_end|>", 1.0)]
    assert weigh(*turns) == answers
    given = [turns[0], turns[1], turns[2] | {"weight": 2}, turns[3]]
    assert weigh(*given) == [answers[0], ("ask<|im_end|>", 2.0), answers[1]]
    asked = weigh(turns[0] | {"train": True}, *turns[1:])
    assert asked == [("ask<|im_end|>", 1.0), *answers]
    # the header of a turn is never mistaken for its text
    assert weigh(user("user", weight=1), answer("x")) == [("user<|im_end|>", 1.0), ("x<|im_end|>", 1.0)]


def test_roles_that_are_learnt() -> None:
    turns = (
        {"role": "system", "content": "sys"},
        user("ask"),
        answer("one"),
        user("b", weight=0),
        answer("two"),
    )
    roles = ("user", "assistant")
    assert weigh(*turns, train_roles=roles) == [(f"{text}<|im_end|>", 1.0) for text in ("ask", "one", "two")]
    assert weigh(*turns, train_roles=("system",)) == [("sys<|im_end|>", 1.0)]


def test_spans_have_their_own_weights_and_the_rest_the_messages() -> None:
    spans = [[6, 10, 0], [0, 3, 0.25]]
    assert weigh(user("a"), answer("abc efgh12 z", spans=spans, weight=2)) == [
        ("abc", 0.25),
        (" ef", 2.0),
        (" z<|im_end|>", 2.0),
    ]
    assert weigh(user("a"), answer("abcdef", spans=[[2, 4, 3]], weight=0)) == [("cd", 3.0)]
    assert weigh(user("abcdef", spans=[[2, 4, 3]]), answer("x", weight=0)) == [("cd", 3.0)]
    # characters, not bytes: three of the vocabulary's tokens are one of this text
    template = characters()
    encoded = sft_sample(row(user("a"), answer("a漢b", spans=[[1, 2, 5]])), template, options())
    assert [w for w in encoded.samples[0].weights.tolist() if w] == [1, 5, 5, 5, 1, 1]


def test_a_special_token_in_the_text_moves_no_span() -> None:
    text = "x<|im_end|>yz"
    turns = user("a"), answer(text, spans=[[11, 12, 4]])
    assert ("y", 4.0) in weigh(*turns)


@pytest.mark.parametrize("tokenizer", [byte_level, metaspace])
def test_a_token_across_a_bound_belongs_to_where_its_last_character_is(tokenizer: Any) -> None:
    template = load_template(tokenizer(TOKENS, CHATML), DataSpec())
    text, found = "I am fine. Thank you", 0
    for word in ("fine", "Thank", "you"):
        start = text.index(word)
        turns = user("How are you?"), answer(text, spans=[[start, start + len(word), 7]])
        (sample,) = sft_sample(row(*turns), template, options()).samples
        backend = template.tokenizer.backend_tokenizer
        whole = template.rendering(row(*turns).conversation or Conversation(()))
        offsets = backend.encode(whole, add_special_tokens=False).offsets
        first = whole.index(text) + start
        assert len(offsets) == len(sample.input_ids)
        expected = [first < end <= first + len(word) for _, end in offsets]
        assert [weight == 7 for weight in sample.weights.tolist()] == expected
        found += sum(expected)
    assert found


def test_what_a_template_trims_moves_no_span() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    template = load_template(tokenizer, DataSpec())
    encoded = sft_sample(row(user("a"), answer("  abcd ", spans=[[3, 5, 2]])), template, options())
    assert learnt(encoded, template) == [("a", 1.0), ("bc", 2.0), ("d<|im_end|>", 1.0)]
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] * 2")
    twice = load_template(tokenizer, DataSpec())
    encoded = sft_sample(row(user("a"), answer("ABC", spans=[[0, 1, 2]])), twice, options())
    assert encoded.samples == () and "changes the content of a message" in str(encoded.lost.dropped)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"weight": -1}, "weight should be a number of 0 or more, not -1"),
        ({"weight": float("nan")}, "weight should be a number of 0 or more, not nan"),
        ({"weight": float("inf")}, "not inf"),
        ({"loss": "yes"}, "loss should be a number of 0 or more, not 'yes'"),
        ({"train": 1}, "train should be true or false, not 1"),
        ({"weight": 0.5, "loss": True}, "weight: 0.5 and loss: True do not agree"),
        ({"spans": 3}, "spans should be a list"),
        ({"spans": [[0, 1]]}, r"a span should be \[start, stop, weight\]"),
        ({"spans": [[0.0, 1, 1]]}, "begins and ends at numbers of characters"),
        ({"spans": [[0, 9, 1]]}, "0 to 9 is not in a content of 3 characters"),
        ({"spans": [[2, 2, 1]]}, "2 to 2 is not in a content"),
        ({"spans": [[0, 2, -1]]}, "the weight of a span should be a number of 0 or more"),
        ({"spans": [[0, 2, 1], [1, 3, 1]]}, "two spans share the characters from 1 to 2"),
    ],
)
def test_weights_that_are_none(said: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        row(user("a"), answer("abc", **said))
    assert "demo, row 0, message 1" in str(caught.value)


def test_pairs_refuse_what_they_do_not_learn() -> None:
    def pair(*asked: Message, better: Message) -> Row:
        chosen = Conversation((*asked, better))
        return Row("demo", 3, chosen, rejected=Conversation((*asked, Message("assistant", "no"))))

    plain = Message("user", "a")
    for row_, why in (
        (pair(plain, better=Message("assistant", "yes", spans=((0, 1, 0.0),))), "spans with weights"),
        (pair(Message("user", "a", weight=1.0), better=Message("assistant", "yes")), "a question is learnt"),
    ):
        with pytest.raises(DataError, match=f"demo, row 3: {why}"):
            pair_sample(row_, characters(), options())
    assert (
        len(pair_sample(pair(plain, better=Message("assistant", "yes")), characters(), options()).samples)
        == 1
    )
