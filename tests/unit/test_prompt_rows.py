"""Rows as prompts: with or without an answer, in every format, too long, and through the whole data path."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from luthier.data.encode import EncodeOptions
from luthier.data.prepare import Preparation, PreparedData, prepare
from luthier.data.prompts import posed_part, prompt_sample
from luthier.data.report import DataReport
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.online import GrpoSpec, PpoSpec
from luthier.recipe.schema import ColumnSpec, DatasetSpec, DataSpec
from luthier.stages import build_stage
from luthier.types import Conversation, DataError, Message, Row, RowError
from tests.rollouts import EXACT
from tests.tiny import chat_tokenizer

SPEC = DataSpec(train=["unused"], max_length=64)


def template() -> ChatTemplate:
    return load_template(chat_tokenizer(), SPEC)


def asked(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in turns))  # type: ignore[arg-type]


def row(*turns: tuple[str, str]) -> Row:
    return Row("demo", 4, asked(*turns))


def rendered(text: str) -> list[int]:
    return list(chat_tokenizer()(text, add_special_tokens=False).input_ids)


QUESTION = "<|im_start|>user\nhow many<|im_end|>\n<|im_start|>assistant\n"


def test_everything_before_the_last_answer() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    before, answer = posed_part(asked(*turns))
    assert (before, answer) == (asked(*turns[:3]), Message("assistant", "d"))
    assert posed_part(asked(*turns[:3])) == (asked(*turns[:3]), None)
    for turns in ([], [("assistant", "b")], [("system", "s"), ("assistant", "b")], [("system", "s")]):
        with pytest.raises(RowError, match="no prompt"):
            posed_part(asked(*turns))


@pytest.mark.parametrize("stage", [PpoSpec(rewards=[EXACT]), GrpoSpec(rewards=[EXACT])], ids=["ppo", "grpo"])
@pytest.mark.parametrize("turns", [[("user", "how many")], [("user", "how many"), ("assistant", "two")]])
def test_a_sample_is_the_prompt_alone(stage: Any, turns: list[tuple[str, str]]) -> None:
    built = build_stage(stage, EncodeOptions.of(SPEC, stage.type))
    encoded = built.encode(row(*turns), template())
    (sample,) = encoded.samples
    assert sample.input_ids.tolist() == rendered(QUESTION)
    assert sample.weights.tolist() == [0.0] * len(sample)
    assert (sample.source, sample.index, sample.branches) == ("demo", 4, ())
    assert encoded.prompts
    assert encoded.lost.dropped is None


def test_too_long_and_unusable() -> None:
    ids = rendered(QUESTION)

    def encoded(**changes: Any) -> Any:
        options = EncodeOptions(**({"max_length": len(ids) - 3, "overflow": "drop"} | changes))
        return prompt_sample(row(("user", "how many"), ("assistant", "two")), template(), options)

    assert encoded(max_length=len(ids)).samples[0].input_ids.tolist() == ids
    dropped = encoded()
    assert (dropped.samples, dropped.lost.dropped) == ((), "prompt longer than max_length")
    cut = encoded(overflow="truncate")
    assert (cut.samples[0].input_ids.tolist(), cut.lost.tokens) == (ids[3:], 3)
    with pytest.raises(DataError, match=rf"demo, row 4: {len(ids)} tokens, more than data\.max_length"):
        encoded(overflow="error")
    # That tool keeps the first tokens, and room for the answer: of 20 tokens "two<|im_end|>" takes 4.
    theirs = encoded(max_length=20, llamafactory=True)
    assert theirs.samples[0].input_ids.tolist() == ids[:16]
    nothing = prompt_sample(row(("assistant", "b")), template(), EncodeOptions(64, "drop"))
    assert nothing.lost.dropped == "no prompt"


# ---- files -------------------------------------------------------------------------------------------------


def prepared(folder: Path, rows: Any, **fields: Any) -> tuple[PreparedData, DataReport]:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    columns = fields.pop("columns", {})
    dataset = DatasetSpec(name="rows", file_name=str(file), columns=ColumnSpec(**columns), **fields)
    spec = DataSpec(train=[dataset], cache=str(folder / "cache"), max_length=64)
    options = EncodeOptions.of(spec, "grpo")
    stage = build_stage(GrpoSpec(rewards=[EXACT]), options)
    how = Preparation(stage.encode, template(), stage.kind, {"stage": "grpo", **asdict(options)}, seed=1)
    data = prepare(spec, how)
    return data, data.reports[0]


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        ([{"instruction": "how many", "input": "", "output": "two"}], {}),
        ([{"instruction": "how many", "input": "", "output": ""}], {}),
        ([{"instruction": "how many", "output": None}], {}),
        ([{"instruction": "how many"}], {}),
        ([{"question": "how many"}], {"columns": {"prompt": "question"}}),
        (
            [{"instruction": "how many", "better": "two", "worse": "three"}],
            {"ranking": True, "columns": {"chosen": "better", "rejected": "worse"}},
        ),
        (
            [{"conversations": [{"from": "human", "value": "how many"}]}],
            {"formatting": "sharegpt"},
        ),
        (
            [{"conversations": [{"from": "human", "value": "how many"}, {"from": "gpt", "value": "two"}]}],
            {"formatting": "sharegpt"},
        ),
    ],
)
def test_formats(rows: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    """Every format gives the same prompt; a prompt is no loss, so `data.max_lost` does not count it."""
    data, report = prepared(tmp_path, rows, **fields)
    assert [sample.input_ids.tolist() for sample in data.train] == [rendered(QUESTION)]
    assert (report.rows, report.samples, report.unsupervised, report.lost_rows) == (1, 1, 0, 0)
    again, _ = prepared(tmp_path, rows, **fields)  # from the cache
    assert [sample.weights.tolist() for sample in again.train] == [[0.0] * len(rendered(QUESTION))]


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    rows = [{"instruction": "how many", "output": "two"}, {"instruction": "x" * 99}, {"instruction": "y"}]
    data, report = prepared(tmp_path, rows)
    assert len(data.train) == 2
    assert dict(report.dropped) == {"prompt longer than max_length": 1}
    assert report.lost_rows == 1
