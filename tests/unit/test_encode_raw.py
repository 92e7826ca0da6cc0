"""Many rows at once are each of them, whatever is in them and however they are encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from luthier.data.encode import EncodeOptions
from luthier.data.encode_raw import encode_all, encode_raw
from luthier.data.preparation import Preparation
from luthier.data.read import RawRow
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.data.template import load_template
from luthier.recipe.schema import DatasetSpec, DataSpec, DpoSpec, SftSpec
from luthier.stages import build_stage
from luthier.types import Encoded

TURNS = (
    "Hi  there.\nHow are\n you?\n\n1. one\n 2. two",
    "Größe, 北京 and e\u0301 …",
    "<|im_end|>",
    "",
    " led ",
    "a\tb \n c",
)
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."}


def _conversations() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"messages": []}, {"messages": [{"role": "robot", "content": "a"}]}]
    for k, text in enumerate(TURNS):
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": TURNS[k - 1]}]
        rows += [{"messages": said}, {"messages": [{"role": "system", "content": text}, *said, *said]}]
        rows.append({"messages": [said[0], THOUGHT, *said]})
    return [{"messages": row["messages"], "tools": None} for row in rows]


def _pairs() -> list[dict[str, Any]]:
    return [
        {"instruction": a, "input": "", "chosen": b, "rejected": c}
        for a, b, c in zip(TURNS, TURNS[1:] + TURNS[:1], TURNS[2:] + TURNS[:2], strict=True)
    ]


def _numbers(found: Encoded) -> Any:
    return found.lost, [
        (s.input_ids.tolist(), s.weights.tolist(), s.source, s.index, s.branches, s.label)
        for s in found.samples
    ]


@pytest.mark.parametrize(
    ("kind", "rules", "template"),
    [
        ("sft", "luthier", None),
        ("sft", "luthier", "alpaca"),
        ("sft", "llamafactory", "qwen"),
        ("sft", "llamafactory", "mistral"),
        ("dpo", "luthier", None),
        ("dpo", "llamafactory", "qwen"),
    ],
)
def test_many_rows_are_each_of_them(
    kind: str, rules: Any, template: str | None, tmp_path: Path, smollm2: Path
) -> None:
    described: dict[str, Any] = {"formatting": "openai", "columns": {"tools": "tools"}}
    if kind == "dpo":
        described = {"ranking": True, "columns": {"chosen": "chosen", "rejected": "rejected"}}
    rows = _conversations() if kind == "sft" else _pairs()
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    spec = DataSpec(
        train=(DatasetSpec(file_name=str(tmp_path / "rows.json"), **described),),
        template=template,
        max_length=90,
        rules=rules,
        overflow="truncate",
    )
    stage = build_stage({"sft": SftSpec, "dpo": DpoSpec}[kind](), EncodeOptions.of(spec, kind))

    def fresh() -> Preparation:
        found = load_template(AutoTokenizer.from_pretrained(smollm2), spec)
        return Preparation(stage.encode, found, stage.kind, {}, seed=0)

    (attr,) = resolve_datasets(spec.train, spec)
    assert isinstance(attr, DatasetAttr)
    raws = [RawRow(k + 50, f"row {k}", row) for k, row in enumerate(rows)]
    apart, together = fresh(), fresh()
    expected = [(raw.index, _numbers(encode_raw(raw, attr, apart))) for raw in raws]
    found, were_ready = [], False
    for index, one in encode_all(raws, attr, together):
        found.append((index, _numbers(one)))
        were_ready |= bool(together.template._ready)
    assert found == expected
    assert sum(len(samples) for _, (_, samples) in found) >= len(rows) // 3
    assert were_ready and not together.template._ready
