"""A translated recipe gives LLaMA-Factory's token sequences and targets, row for row (see data/llamafactory)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from luthier.data.batching import RowsRule, plan_epoch
from luthier.data.encode import EncodeOptions
from luthier.data.prepare import Preparation, prepare
from luthier.data.table import SampleTable
from luthier.data.template import load_template
from luthier.recipe.schema import DataSpec, PtSpec, SftSpec
from luthier.stages.pt import Pretraining
from luthier.stages.sft import SupervisedFineTuning
from luthier.types import IGNORE_INDEX

CASES = sorted(Path(__file__).parent.joinpath("data", "llamafactory").glob("*.json"))
PAD = 2


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_tokens_targets_and_order(case: Path, smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    expected = json.loads(case.read_text())
    asked = yaml.safe_load(case.with_suffix(".yaml").read_text())
    stage = asked["stage"]
    packing = asked.get("packing", stage == "pt") or asked.get("neat_packing", False)
    # that tool lowers the limit by one where the file itself asks for packing
    limit = asked["cutoff_len"] - ("packing" in asked or "neat_packing" in asked)
    spec = DataSpec(
        train=tuple(asked["dataset"].split(",")),
        directory=str(shared_data),
        cache=str(tmp_path),
        max_samples=asked["max_samples"],
        max_length=limit,
        overflow="truncate",
        packing=packing,
        template=asked.get("template"),
        dev_split=asked.get("val_size", 0.0),
        train_on_prompt=asked.get("train_on_prompt", False),
        train_after_stop=True,
        parse_special_tokens=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    template = load_template(tokenizer, spec, pieces=True)
    options = EncodeOptions.of(spec, stage, llamafactory=True, pad_id=tokenizer.pad_token_id)
    part: Any = Pretraining(PtSpec(), options) if stage == "pt" else SupervisedFineTuning(SftSpec(), options)
    kind: Any = "text" if stage == "pt" else "conversation"
    how = Preparation(
        part.encode, template, kind, {"stage": stage, **asdict(options)}, asked["seed"], llamafactory=True
    )
    data = prepare(spec, how)

    tables = {"train": data.train, "eval": data.eval.get("dev")}
    for split, wanted in expected["tokenized"].items():
        table = tables[split]
        assert table is not None
        packed = table.groups or [[i] for i in range(len(table))]
        assert len(packed) == wanted["count"]
        for number, row in wanted["rows"].items():
            ids, labels = _as_row(table, packed[int(number)], limit + 1 if table.groups else 0)
            assert len(ids) == row["tokens"]
            assert _sha([ids, None if stage == "pt" else labels]) == row["sha256"], number

    steps = []
    for epoch in range(2):
        rule = RowsRule(asked["per_device_train_batch_size"], asked["gradient_accumulation_steps"])
        rows = len(data.train.groups or data.train)
        steps += [step[0] for step in plan_epoch([1] * rows, rule=rule, epoch=epoch, seed=asked["seed"])]
    assert steps[: expected["max_steps"]] == [step["rows"] for step in expected["steps"]]


def _as_row(table: SampleTable, group: list[int], padded_to: int) -> tuple[list[int], list[int]]:
    samples = [table[i] for i in group]
    ids = np.concatenate([sample.input_ids for sample in samples])
    labels = np.where(np.concatenate([sample.weights for sample in samples]) > 0, ids, IGNORE_INDEX)
    padding = max(padded_to - len(ids), 0)
    return [*ids.tolist(), *[PAD] * padding], [*labels.tolist(), *[IGNORE_INDEX] * padding]


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:16]
