"""A hundred thousand rows with every defect that the report counts: the counts are what was planted."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.data.encode import EncodeOptions
from luthier.data.prepare import Preparation, prepare
from luthier.data.report import DataReport
from luthier.data.template import load_template
from luthier.recipe.schema import DatasetSpec, DataSpec, SftSpec
from luthier.stages import build_stage
from tests.tiny import chat_tokenizer

ROWS = 100_000
MAX_LENGTH = 120
LONG = "x" * 150
"""A letter is a token."""

Row = dict[str, Any]


def said(*contents: Any, **row: Any) -> Row:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": text} for k, text in enumerate(contents)], **row}


def good(rng: random.Random) -> Row:
    return said(
        *("".join(rng.choices("abc ", k=rng.randint(1, 12))) + "." for _ in range(rng.choice((2, 2, 4))))
    )


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
DEFECTS: dict[str, Callable[[], Row]] = {
    "no messages": lambda: {"messages": []},
    "unknown role 'robot'": lambda: {"messages": [{"role": "robot", "content": "a"}]},
    "content is not text": lambda: said("a", 7),
    "text holds half of a surrogate pair": lambda: said("a\ud800", "b"),
    "no answer to learn": lambda: said("a", " "),
    "tool call is not JSON": lambda: {"messages": [said("a")["messages"][0], CALL | {"tool_calls": "{"}]},
    "tool call without a name": lambda: {"messages": [said("a")["messages"][0], CALL | {"tool_calls": [{}]}]},
    "template 'tokenizer' has no place for tools": lambda: said(
        "a", "b", tools=[{"type": "function", "function": {"name": "add"}}]
    ),
    "template 'tokenizer' has no place for tool calls": lambda: {
        "messages": [said("a")["messages"][0], CALL]
    },
    "tools are not a list of objects": lambda: said("a", "b", tools=[3]),
    "reasoning is not text": lambda: {
        "messages": [said("a")["messages"][0], {"role": "assistant", "content": "b", "reasoning": 3}]
    },
    "longer than max_length": lambda: said("a", LONG),
}


def prepared(file: Path, cache: Path, overflow: str) -> DataReport:
    spec = DataSpec(
        train=(DatasetSpec(file_name=str(file), formatting="openai", columns={"tools": "tools"}),),
        max_length=MAX_LENGTH,
        overflow=overflow,
        cache=str(cache),
    )
    template = load_template(chat_tokenizer(), spec)
    stage = build_stage(SftSpec(), EncodeOptions.of(spec, "sft"))
    how = Preparation(stage.encode, template, stage.kind, {"stage": "sft", "overflow": overflow}, seed=0)
    return prepare(spec, how).reports[0]


@pytest.mark.slow
def test_the_counts_are_what_was_planted(tmp_path: Path) -> None:
    rng, planted = random.Random(7), Counter[str]()
    names = list(DEFECTS)
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            name = rng.choice(names) if rng.random() < 0.02 else ""
            planted[name] += bool(name)
            row = DEFECTS[name]() if name else good(rng)
            file.write(json.dumps({"tools": None} | row) + "\n")
    del planted[""]
    report = prepared(tmp_path / "rows.jsonl", tmp_path / "cache", "drop")
    assert report.rows == ROWS and len(planted) == len(DEFECTS)
    assert dict(report.dropped) == dict(planted)
    assert report.lost_rows == planted.total() and report.samples == ROWS - planted.total()
    assert (report.cut_rows, report.unsupervised) == (0, 0)


def test_what_is_cut_is_counted(tmp_path: Path) -> None:
    """A letter is a token; a turn has its role, two marks and two line ends besides."""
    rows = (
        [said("a", "b")] * 5 + [said("a", LONG)] * 3 + [said("a", "b", LONG, "c")] * 2 + [said(LONG * 2, "b")]
    )
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"tools": None} | row) + "\n" for row in rows), encoding="utf-8"
    )
    report = prepared(tmp_path / "rows.jsonl", tmp_path / "cache", "truncate")
    sizes = [sum(len(m["role"]) + len(m["content"]) + 4 for m in row["messages"]) for row in rows]
    assert report.cut_rows == 6
    assert report.cut_tokens == sum(size - MAX_LENGTH for size in sizes if size > MAX_LENGTH)
    assert report.tokens == sum(min(size, MAX_LENGTH) for size in sizes)
    assert dict(report.dropped) == {} and report.lost_rows == 6
