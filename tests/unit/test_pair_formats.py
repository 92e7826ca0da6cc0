"""Raw rows -> pairs of answers, answers with a label, margins; and descriptions that cannot give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.data.formats import require_kind, to_row
from luthier.data.read import RawRow
from luthier.data.registry import DEFAULT_COLUMNS, DEFAULT_TAGS, DatasetAttr, Formatting, resolve_datasets
from luthier.recipe.schema import ColumnSpec, DatasetSpec, DataSpec
from luthier.types import Conversation, DataError, Message, Row, RowError, RowKind, ToolCall


def attr(formatting: Formatting, *, ranking: bool = True, **columns: str | None) -> DatasetAttr:
    found = {"chosen": "chosen", "rejected": "rejected"} if ranking else {}
    return DatasetAttr(
        name="demo",
        load_from="file",
        path="demo.json",
        formatting=formatting,
        ranking=ranking,
        columns=DEFAULT_COLUMNS[formatting].model_copy(update={**found, **columns}),
        tags=DEFAULT_TAGS[formatting],
        named=frozenset(columns),
    )


def read(columns: Mapping[str, Any], description: DatasetAttr, kind: RowKind = "pair") -> Row:
    row = to_row(RawRow(7, "demo.json, row 7", columns), description, kind)
    assert (row.source, row.index, row.text) == ("demo", 7, None)
    return row


def said(conversation: Conversation | None) -> list[tuple[str, str]]:
    assert conversation is not None
    return [(message.role, message.content) for message in conversation.messages]


def reason(columns: Mapping[str, Any], description: DatasetAttr, kind: RowKind = "pair") -> str:
    with pytest.raises(RowError) as caught:
        read(columns, description, kind)
    return caught.value.reason


ASKED = [{"from": "human", "value": "q"}]
HUB = attr("openai")


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


# --------------------------------------------------------------------------------------------------
# Pairs


def test_alpaca_pairs_share_all_before_the_answer() -> None:
    columns = {
        "instruction": "Add",
        "input": "1 2",
        "chosen": "3",
        "rejected": "4",
        "past": [["a", "b"]],
        "sys": "s",
    }
    row = read(columns, attr("alpaca", history="past", system="sys"))
    before = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "Add\n1 2")]
    assert said(row.conversation) == [*before, ("assistant", "3")]
    assert said(row.rejected) == [*before, ("assistant", "4")]
    assert (row.margin, row.desirable) == (None, None)


def test_alpaca_pairs_need_no_response_column() -> None:
    description = replace(attr("alpaca"), columns=ColumnSpec(prompt="prompt", chosen="good", rejected="bad"))
    row = read({"prompt": "q", "good": "yes", "bad": "no"}, description)
    assert said(row.conversation) == [("user", "q"), ("assistant", "yes")]
    assert said(row.rejected) == [("user", "q"), ("assistant", "no")]


@pytest.mark.parametrize(
    ("chosen", "answer"),
    [
        ("yes", [Message("assistant", "yes")]),
        ({"from": "gpt", "value": "yes"}, [Message("assistant", "yes")]),
        ([{"from": "gpt", "value": "yes", "weight": 0.5}], [Message("assistant", "yes", weight=0.5)]),
        (
            [
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "yes"},
            ],
            [
                Message("assistant", "", tool_calls=(ToolCall("f", {}),)),
                Message("tool", "1"),
                Message("assistant", "yes"),
            ],
        ),
    ],
)
def test_sharegpt_answers_are_texts_messages_or_lists(chosen: Any, answer: list[Message]) -> None:
    columns = {
        "conversations": ASKED,
        "chosen": chosen,
        "rejected": "no",
        "sys": "s",
        "tools": [{"name": "f"}],
    }
    row = read(columns, attr("sharegpt", system="sys", tools="tools"))
    before = (Message("system", "s"), Message("user", "q"))
    tools = ({"type": "function", "function": {"name": "f"}},)
    assert row.conversation == Conversation((*before, *answer), tools)
    assert row.rejected == Conversation((*before, Message("assistant", "no")), tools)


def test_openai_answers_have_openais_keys() -> None:
    columns = {
        "messages": [turn("system", "s"), turn("user", "q")],
        "chosen": turn("assistant", "yes", reasoning_content="hm"),
        "rejected": [turn("assistant", "no")],
    }
    row = read(columns, HUB)
    assert row.conversation is not None
    assert row.conversation.messages[-1] == Message("assistant", "yes", "hm")
    assert said(row.rejected) == [("system", "s"), ("user", "q"), ("assistant", "no")]


def test_whole_conversations_without_a_messages_column() -> None:
    before = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    columns = {
        "prompt": "a",
        "chosen": [*before, turn("assistant", "yes")],
        "rejected": [*before, turn("assistant", "no")],
    }
    row = read(columns, HUB)
    assert said(row.conversation)[:3] == said(row.rejected)[:3]
    assert [said(row.conversation)[3:], said(row.rejected)[3:]] == [
        [("assistant", "yes")],
        [("assistant", "no")],
    ]
    # an assistant may have said the first word, too
    greeting = [turn("assistant", "Hello"), turn("user", "a")]
    row = read(
        {"chosen": [*greeting, turn("assistant", "b")], "rejected": [*greeting, turn("assistant", "c")]}, HUB
    )
    assert said(row.conversation) == [("assistant", "Hello"), ("user", "a"), ("assistant", "b")]
    # where columns are listed and messages is not among them
    description = replace(HUB, columns=ColumnSpec(chosen="chosen", rejected="rejected"))
    assert read(columns, description).conversation == read(columns, HUB).conversation


def test_whole_conversations_beside_a_messages_column() -> None:
    """As in data sets whose column `messages` repeats the better conversation."""
    chosen = [turn("user", "a"), turn("assistant", "yes")]
    columns = {"messages": chosen, "chosen": chosen, "rejected": [turn("user", "a"), turn("assistant", "no")]}
    row = read(columns, HUB)
    assert said(row.conversation) == [("user", "a"), ("assistant", "yes")]
    assert said(row.rejected) == [("user", "a"), ("assistant", "no")]


@pytest.mark.parametrize(
    ("formatting", "change", "expected"),
    [
        ("alpaca", {"chosen": None}, "no answer"),
        ("alpaca", {"rejected": 3}, "answer is not text"),
        ("alpaca", {"chosen": {"content": "yes"}}, "answer is not text"),
        ("openai", {"chosen": None}, "no answer"),
        ("openai", {"rejected": []}, "no answer"),
        ("openai", {"rejected": 3}, "answer is neither text nor messages"),
        ("openai", {"chosen": turn("judge", "yes")}, "unknown role 'judge'"),
        ("openai", {"rejected": turn("assistant", "half \ud83d")}, "text holds half of a surrogate pair"),
        ("openai", {"messages": []}, "no messages"),
    ],
)
def test_pairs_that_cannot_be_used(formatting: Formatting, change: dict[str, Any], expected: str) -> None:
    given = {"instruction": "q", "messages": [turn("user", "q")], "chosen": "yes", "rejected": "no"}
    description = attr(formatting)
    assert read(given, description).rejected is not None
    assert reason({**given, **change}, description) == expected


def test_a_row_without_an_answer_column() -> None:
    assert (
        reason({"instruction": "q", "chosen": "yes"}, attr("alpaca"))
        == "no column 'rejected' with the answer"
    )
    with pytest.raises(
        DataError, match="row 7: no column 'messages' with the messages; its columns are chosen"
    ):
        read({"chosen": "yes", "rejected": "no"}, HUB)
    with pytest.raises(DataError, match=r"row 7, chosen: no 'role' in it \(it has content\)"):
        read({"messages": [turn("user", "q")], "chosen": {"content": "yes"}, "rejected": "no"}, HUB)
    with pytest.raises(DataError, match=r"row 7, rejected, message 1: no 'role' in it"):
        broken = [turn("user", "q"), {"text": "no"}]
        read({"messages": [turn("user", "q")], "chosen": "yes", "rejected": broken}, HUB)


def test_margins() -> None:
    description = attr("alpaca", margin="gap")
    given = {"instruction": "q", "chosen": "yes", "rejected": "no"}
    assert [read({**given, "gap": gap}, description).margin for gap in (0, 1.5, -2)] == [0.0, 1.5, -2.0]
    assert read({**given, "gap": None}, description).margin is None
    assert read(given, description).margin is None
    for gap in ("1", True, float("nan"), float("inf")):
        assert reason({**given, "gap": gap}, description) == "margin is not a number"


# --------------------------------------------------------------------------------------------------
# Feedback


def test_labels() -> None:
    description = attr("openai", ranking=False, kto_tag="label")
    turns = [turn("user", "q"), turn("assistant", "a")]
    for label, expected in [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        ("TRUE", True),
        ("0", False),
    ]:
        row = read({"messages": turns, "label": label}, description, "feedback")
        assert row.desirable is expected and row.rejected is None
        assert said(row.conversation) == [("user", "q"), ("assistant", "a")]
    for label in (2, -1, 1.0, "yes", [True]):
        columns = {"messages": turns, "label": label}
        assert reason(columns, description, "feedback") == "label is not true or false"
    assert reason({"messages": turns, "label": None}, description, "feedback") == "no label"
    assert reason({"messages": turns}, description, "feedback") == "no label"


def test_alpaca_feedback_has_its_answer_in_the_response_column() -> None:
    description = attr("alpaca", ranking=False, kto_tag="good")
    row = read({"instruction": "q", "output": "a", "good": False}, description, "feedback")
    assert said(row.conversation) == [("user", "q"), ("assistant", "a")] and row.desirable is False
    assert (
        reason({"instruction": "q", "good": True}, description, "feedback")
        == "no column 'output' with the answer"
    )


def test_pairs_are_feedback_too() -> None:
    row = read({"instruction": "q", "chosen": "yes", "rejected": "no"}, attr("alpaca"), "feedback")
    assert said(row.conversation)[-1] == ("assistant", "yes") and said(row.rejected)[-1] == (
        "assistant",
        "no",
    )
    assert row.desirable is None


# --------------------------------------------------------------------------------------------------
# Descriptions


NO_PAIRS = (
    "data set 'demo' is not said to hold pairs of answers, which stage 'dpo' learns from: add ranking: true and name "
    "columns.chosen and columns.rejected"
)
NO_LABELS = (
    "data set 'demo' has no labels, which stage 'kto' learns from: name the column that says whether an answer is "
    "desirable in columns.kto_tag"
)
NO_SIDES = (
    "data set 'demo' holds preference pairs (ranking: true) and does not say where: name columns.chosen and "
    "columns.rejected"
)
NOT_FOR = "data set 'demo' holds preference pairs (ranking: true), which stage 'sft' does not learn from"


@pytest.mark.parametrize(
    ("description", "kind", "stage", "message"),
    [
        (attr("openai", ranking=False), "pair", "dpo", NO_PAIRS),
        (attr("openai", ranking=False, kto_tag="label"), "pair", "dpo", NO_PAIRS),
        (attr("openai", ranking=False), "feedback", "kto", NO_LABELS),
        (attr("openai", rejected=None), "pair", "rm", NO_SIDES),
        (attr("openai", chosen=None), "feedback", "kto", NO_SIDES),
        (attr("openai"), "conversation", "sft", NOT_FOR),
        (attr("openai", chosen=None), "conversation", "sft", NOT_FOR),
    ],
)
def test_descriptions_that_do_not_fit(
    description: DatasetAttr, kind: RowKind, stage: str, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        require_kind(description, kind, stage)
    assert str(caught.value) == message


def test_descriptions_that_fit() -> None:
    require_kind(attr("openai"), "pair", "dpo")
    require_kind(attr("openai"), "feedback", "kto")
    require_kind(attr("openai", ranking=False, kto_tag="label"), "feedback", "kto")
    require_kind(attr("openai", ranking=False, kto_tag="label"), "conversation", "sft")
    require_kind(attr("openai", ranking=False), "text", "pt")


def test_answers_have_names_of_their_own_where_none_are_listed(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    spec = DataSpec(directory=str(tmp_path))
    pairs, plain, renamed = (
        DatasetSpec(file_name="rows.json", name="a", ranking=True),
        DatasetSpec(file_name="rows.json", name="b"),
        DatasetSpec(file_name="rows.json", name="c", ranking=True, columns=ColumnSpec(chosen="good")),
    )
    found = [one.columns for one in resolve_datasets([pairs, plain, renamed], spec)]
    assert [(c.chosen, c.rejected) for c in found] == [
        ("chosen", "rejected"),
        (None, None),
        ("good", "rejected"),
    ]
