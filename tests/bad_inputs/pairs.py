"""Pairs of answers and answers with a label that cannot be used: descriptions and rows."""

from __future__ import annotations

import json
from typing import Any

from bad_inputs import BadInput
from bad_inputs.data import lost, nothing_left, prepared

PAIR = {"instruction": "How?", "chosen": "So.", "rejected": "No."}
LABELLED = {"instruction": "How?", "output": "So.", "good": True}
ASKED = [{"role": "user", "content": "How?"}]
OTHER = [{"role": "user", "content": "Why?"}]
SO = {"role": "assistant", "content": "So."}
NO = {"role": "assistant", "content": "No."}


def pairs(
    name: str,
    rows: Any,
    message: str,
    *,
    stage: str = "dpo",
    formatting: str = "alpaca",
    ranking: bool = True,
    columns: Any = None,
    **data: Any,
) -> BadInput:
    """`luthier prepare` of a file of pairs."""
    dataset = {
        "file_name": "x.json",
        "formatting": formatting,
        "ranking": ranking,
        "columns": columns or {},
    }
    return prepared(name, {"data/x.json": json.dumps(rows)}, message, dataset, stage=stage, **data)


def feedback(name: str, rows: Any, message: str, **more: Any) -> BadInput:
    """`luthier prepare` of a file of answers with a label."""
    return pairs(
        name, rows, message, **({"stage": "kto", "ranking": False, "columns": {"kto_tag": "good"}} | more)
    )


CASES: list[BadInput] = [
    # --- descriptions
    *(
        pairs(
            f"no pairs for {stage}",
            [PAIR],
            f"data set 'x' is not said to hold pairs of answers, which stage '{stage}' learns from: add ranking: true "
            "and name columns.chosen and columns.rejected",
            stage=stage,
            ranking=False,
        )
        for stage in ("rm", "dpo")
    ),
    prepared(
        "pairs that are listed nowhere",
        {
            "data/x.json": json.dumps([PAIR]),
            "data/dataset_info.json": json.dumps(
                {"x": {"file_name": "x.json", "ranking": True, "columns": {"prompt": "instruction"}}}
            ),
        },
        "data set 'x' holds preference pairs (ranking: true) and does not say where: name columns.chosen and "
        "columns.rejected",
        "x",
        stage="dpo",
    ),
    feedback(
        "no column of labels for kto",
        [LABELLED],
        "data set 'x' has no labels, which stage 'kto' learns from: name the column that says whether an answer is "
        "desirable in columns.kto_tag",
        columns={},
    ),
    pairs(
        "pairs for sft",
        [PAIR],
        "data set 'x' holds preference pairs (ranking: true), which stage 'sft' does not learn from",
        stage="sft",
    ),
    feedback(
        "a column of labels that no row has",
        [{"instruction": "How?", "output": "So."}],
        "data set 'x': columns.kto_tag names 'good', which no row of data/x.json has; its columns are instruction, "
        "output",
    ),
    # --- rows
    pairs(
        "equal answers",
        [PAIR, {**PAIR, "rejected": "So."}],
        lost("chosen and rejected are the same", "1", of=2),
    ),
    pairs("an empty answer", [PAIR, {**PAIR, "chosen": " "}], lost("empty answer", "1", of=2)),
    pairs("only empty answers", [{**PAIR, "chosen": ""}], nothing_left("empty answer"), stage="rm"),
    pairs("a missing answer", [PAIR, {**PAIR, "rejected": None}], lost("no answer", "1", of=2)),
    pairs(
        "no column of an answer",
        [{"instruction": "How?", "chosen": "So."}],
        nothing_left("no column 'rejected' with the answer"),
    ),
    pairs("an answer that is a number", [PAIR, {**PAIR, "chosen": 3}], lost("answer is not text", "1", of=2)),
    pairs(
        "answers to two prompts",
        [
            {"chosen": [*ASKED, SO], "rejected": [*ASKED, NO]},
            {"chosen": [*ASKED, SO], "rejected": [*OTHER, NO]},
        ],
        lost("prompts of chosen and rejected differ", "1", of=2),
        formatting="openai",
    ),
    pairs(
        "a conversation that ends with a question",
        [{"chosen": [*ASKED, SO], "rejected": [*ASKED, NO]}, {"chosen": ASKED, "rejected": [*ASKED, NO]}],
        lost("does not end with an answer", "1", of=2),
        formatting="openai",
    ),
    pairs(
        "answers in another format",
        [{"messages": ASKED, "chosen": {"from": "gpt", "value": "So."}, "rejected": NO}],
        "data/x.json, row 0, chosen: no 'role' in it (it has from, value); set tags.role_tag and tags.content_tag",
        formatting="openai",
    ),
    pairs(
        "texts without messages",
        [{"chosen": "So.", "rejected": "No."}],
        "data/x.json, row 0: no column 'messages' with the messages; its columns are chosen, rejected. Name it in "
        "columns.messages",
        formatting="openai",
    ),
    pairs(
        "a margin that is a text",
        [{**PAIR, "gap": 1}, {**PAIR, "gap": "1"}],
        lost("margin is not a number", "1", of=2),
        columns={"margin": "gap"},
        stage="rm",
    ),
    pairs(
        "a pair that is too long",
        [PAIR, {**PAIR, "rejected": "No. " * 100}],
        "x, row 1: 424 tokens, more than data.max_length (100); raise it, or choose data.overflow: drop or truncate",
        max_length=100,
        overflow="error",
    ),
    pairs(
        "pairs that are all too long",
        [PAIR],
        nothing_left("longer than max_length"),
        max_length=10,
    ),
    pairs(
        "answers that differ beyond max_length",
        [{**PAIR, "chosen": "So. " * 10, "rejected": "So. " * 11}],
        nothing_left("chosen and rejected are the same within max_length"),
        max_length=20,
        overflow="truncate",
    ),
    feedback("a missing label", [LABELLED, {**LABELLED, "good": None}], lost("no label", "1", of=2)),
    feedback(
        "a label that is a word",
        [LABELLED, {**LABELLED, "good": "yes"}, {**LABELLED, "good": 2}],
        lost("label is not true or false", "1, 2", of=3),
    ),
    feedback(
        "an empty answer with a label",
        [LABELLED, {**LABELLED, "output": ""}],
        lost("empty answer", "1", of=2),
    ),
]
