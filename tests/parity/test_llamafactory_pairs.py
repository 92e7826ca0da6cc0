"""Pairs and feedback: LLaMA-Factory's token sequences, targets and labels, row for row.

`data/llamafactory_pairs.json` was recorded from llamafactory 0.9.5 (transformers 5.6, datasets 4.0, SmolLM2's own chat
template) by calling its `get_dataset` with these settings on the demonstration files of its repository. Each sequence
is [tokens, labels other than -100, the first 16 digits of the SHA-256 of the compact JSON [input_ids, labels]].
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from luthier.data.collate import rows_of
from luthier.data.encode import EncodeOptions
from luthier.data.pairs import feedback_sample, pair_sample
from luthier.data.partners import Mismatched
from luthier.data.prepare import Preparation, PreparedData, prepare
from luthier.data.template import load_template
from luthier.recipe.schema import DataSpec
from luthier.types import IGNORE_INDEX, Sample

RUNS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "llamafactory_pairs.json").read_text()
)


def tokenized(run: dict[str, Any], smollm2: Path, shared_data: Path, cache: Path) -> PreparedData:
    spec = DataSpec(
        train=(run["dataset"],),
        directory=str(shared_data),
        cache=str(cache),
        max_samples=run["max_samples"],
        max_length=run["cutoff_len"],
        overflow="truncate",
        train_after_stop=True,
        parse_special_tokens=True,
    )
    template = load_template(AutoTokenizer.from_pretrained(smollm2), spec, pieces=True)
    stage = run["stage"]
    options = EncodeOptions.of(spec, stage, llamafactory=True)
    encode = partial(pair_sample if stage == "dpo" else feedback_sample, options=options)
    kind: Any = "pair" if stage == "dpo" else "feedback"
    how = Preparation(encode, template, kind, {"stage": stage, **asdict(options)}, seed=42, llamafactory=True)
    return prepare(spec, how)


def recorded(row: Sample) -> list[Any]:
    labels = np.where(row.weights > 0, row.input_ids, IGNORE_INDEX).tolist()
    text = json.dumps([row.input_ids.tolist(), labels], separators=(",", ":"))
    return [len(row), int((row.weights > 0).sum()), hashlib.sha256(text.encode()).hexdigest()[:16]]


def test_the_recording_holds_cut_and_uncut_rows() -> None:
    assert [len(run["rows"]) for run in RUNS.values()] == [12] * 6
    cut = {
        name: sum(
            sequence[0] == run["cutoff_len"]
            for row in run["rows"]
            for sequence in row.values()
            if isinstance(sequence, list)
        )
        for name, run in RUNS.items()
    }
    assert cut["dpo_long"] == cut["kto_long"] == 0
    assert min(cut[name] for name in ("dpo", "kto", "dpo_tiny", "kto_tiny")) >= 5


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("dpo")])
def test_pairs(name: str, smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    run = RUNS[name]
    table = tokenized(run, smollm2, shared_data, tmp_path).train
    assert len(table) == len(run["rows"])
    for sample, row in zip(table, run["rows"], strict=True):
        assert [recorded(one) for one in rows_of(sample)] == [row["chosen"], row["rejected"]]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("kto")])
def test_feedback(name: str, smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    run = RUNS[name]
    table = tokenized(run, smollm2, shared_data, tmp_path).train
    assert len(table) == len(run["rows"])
    for sample, row in zip(table, run["rows"], strict=True):
        assert [recorded(one) for one in rows_of(sample)] == [row["answer"]]
        assert sample.label == float(row["desirable"])


def test_mismatched_answers(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    """Where nothing is too long. There, that tool divides the room for each mismatched answer anew; here, the borrowed
    answer is what was kept of it behind its own prompt."""
    run = RUNS["kto_long"]
    table = tokenized(run, smollm2, shared_data, tmp_path).train
    mismatched = Mismatched.of(table, run["cutoff_len"])
    assert [recorded(rows_of(sample)[1]) for sample in mismatched] == [
        row["mismatched"] for row in run["rows"]
    ]
    cut = RUNS["kto"]
    short = tokenized(cut, smollm2, shared_data, tmp_path).train
    lengths = [len(rows_of(sample)[1]) for sample in Mismatched.of(short, cut["cutoff_len"])]
    assert max(lengths) <= cut["cutoff_len"]
