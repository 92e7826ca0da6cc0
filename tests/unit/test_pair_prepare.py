"""Pairs and feedback through the whole data path, from tiny files and from real ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.data.encode import EncodeOptions
from luthier.data.pairs import feedback_sample, pair_sample
from luthier.data.prepare import Preparation, PreparedData, prepare
from luthier.data.template import load_template
from luthier.recipe.schema import ColumnSpec, DatasetSpec, DataSpec
from luthier.types import DataError
from tests.tiny import CHATML, chat_tokenizer

QUESTIONS = [{"question": f"Is it {n}?", "chosen": "Yes." * n, "rejected": f"No, {n}."} for n in range(1, 9)]
PAIRED = {"prompt": "question"}
LABELLED = {"prompt": "question", "response": "chosen", "kto_tag": "label"}


def prepared(
    stage: str, cache: Path, *train: str | DatasetSpec, rules: str = "luthier", **fields: Any
) -> PreparedData:
    spec = DataSpec(train=train, cache=str(cache), **({"max_length": 4096} | fields))
    template = load_template(chat_tokenizer(), spec)
    options = EncodeOptions.of(spec, stage, llamafactory=rules == "llamafactory")
    encode = partial(feedback_sample if stage == "kto" else pair_sample, options=options)
    kind: Any = "feedback" if stage == "kto" else "pair"
    how = Preparation(
        encode,
        template,
        kind,
        {"stage": stage, **asdict(options)},
        seed=42,
        llamafactory=options.llamafactory,
    )
    return prepare(spec, how)


def dataset(
    folder: Path, rows: Any, columns: Mapping[str, str], name: str = "rows", *, ranking: bool = True
) -> DatasetSpec:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(rows))
    return DatasetSpec(name=name, file_name=str(file), ranking=ranking, columns=ColumnSpec(**columns))


def labelled(folder: Path, rows: Any, name: str = "rows") -> DatasetSpec:
    return dataset(folder, rows, LABELLED, name, ranking=False)


# --------------------------------------------------------------------------------------------------
# Files made up


def test_pairs(tmp_path: Path) -> None:
    data = prepared("dpo", tmp_path / "cache", dataset(tmp_path, QUESTIONS, PAIRED))
    (report,) = data.reports
    table = data.train
    assert (report.rows, report.samples, report.lost_rows) == (8, 8, 0)
    assert report.tokens == sum(len(sample) for sample in table)
    # each answer is its characters and a stop token
    answers = [len(row["chosen"]) + len(row["rejected"]) + 2 for row in QUESTIONS]
    assert report.targets == sum(answers)
    assert (table.lengths - table.prompt_lengths).tolist() == answers
    assert table.num_branches.tolist() == [2] * 8
    tokenizer = chat_tokenizer()
    first, second = table[2].branches
    assert tokenizer.decode(table[2].input_ids[first:second]) == "Yes.Yes.Yes.<|im_end|>"
    assert tokenizer.decode(table[2].input_ids[second:]) == "No, 3.<|im_end|>"
    assert tokenizer.decode(table[2].input_ids[:first]).endswith(
        "Is it 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert np.isnan([sample.label for sample in table]).all()


def test_the_cache_gives_the_same_samples(tmp_path: Path) -> None:
    rows = [{**row, "gap": n / 4} for n, row in enumerate(QUESTIONS)]
    described = dataset(tmp_path, rows, {**PAIRED, "margin": "gap"})
    made, found = (prepared("rm", tmp_path / "cache", described) for _ in range(2))
    assert made.fingerprints == found.fingerprints and made.reports == found.reports
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert [sample.label for sample in found.train] == [n / 4 for n in range(8)]
    for one, other in zip(made.train, found.train, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist() and one.branches == other.branches


def test_all_that_decides_the_samples_is_in_the_key(tmp_path: Path) -> None:
    rows = [{**row, "gap": 1, "label": True} for row in QUESTIONS]
    cache = tmp_path / "cache"
    pairs, swapped = (
        dataset(tmp_path, rows, PAIRED | more) for more in ({}, {"chosen": "rejected", "rejected": "chosen"})
    )
    margin = dataset(tmp_path, rows, {**PAIRED, "margin": "gap"})
    keys = [
        prepared("dpo", cache, pairs).fingerprints["rows"],
        prepared("rm", cache, pairs).fingerprints["rows"],
        prepared("rm", cache, margin).fingerprints["rows"],
        prepared("dpo", cache, swapped).fingerprints["rows"],
        prepared("kto", cache, pairs).fingerprints["rows"],
        prepared("kto", cache, labelled(tmp_path, rows)).fingerprints["rows"],
        prepared("dpo", cache, pairs, max_length=100).fingerprints["rows"],
        prepared("dpo", cache, pairs, overflow="truncate").fingerprints["rows"],
        prepared("dpo", cache, pairs, rules="llamafactory").fingerprints["rows"],
        prepared("dpo", cache, pairs, train_after_stop=True).fingerprints["rows"],
    ]
    assert len(set(keys)) == len(keys)
    assert prepared("dpo", cache, pairs, workers=2).fingerprints["rows"] == keys[0]


def test_bad_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        QUESTIONS[0],
        {"question": "same", "chosen": "So.", "rejected": "So."},
        {"question": "empty", "chosen": "So.", "rejected": " "},
        {"question": "none", "chosen": None, "rejected": "So."},
        {"question": "missing", "chosen": "So."},
        {"question": "number", "chosen": 1, "rejected": "So."},
        {"question": "long", "chosen": "So." * 500, "rejected": "No."},
    ]
    described = dataset(tmp_path, rows, PAIRED)
    (report,) = prepared("dpo", tmp_path / "cache", described, max_length=500).reports
    assert report.samples == 1 and report.lost_rows == 6
    assert report.dropped == {
        "chosen and rejected are the same": 1,
        "empty answer": 1,
        "no answer": 1,
        "no column 'rejected' with the answer": 1,
        "answer is not text": 1,
        "longer than max_length": 1,
    }
    assert [list(rows) for rows in report.examples.values()] == [[1], [2], [3], [4], [5], [6]]
    foreign = prepared("dpo", tmp_path / "cache", described, max_length=500, rules="llamafactory")
    assert foreign.reports[0].samples == 3  # equal and empty answers are kept there


def test_truncation_is_counted(tmp_path: Path) -> None:
    described = dataset(tmp_path, QUESTIONS, PAIRED)
    whole = prepared("dpo", tmp_path / "cache", described).train
    rows = whole.row_lengths
    limit = int(rows.max()) - 5
    data = prepared("dpo", tmp_path / "cache", described, max_length=limit, overflow="truncate")
    (report,) = data.reports
    over = np.maximum(rows - limit, 0)
    assert over.sum() > 5  # more than one row is cut
    assert (report.cut_rows, report.cut_tokens) == (int((over > 0).sum()), int(over.sum()))
    assert report.lost_answers == 0 and report.lost_rows == report.cut_rows
    assert data.train.row_lengths.max() == limit
    # only prompts were cut: the same answers are left
    for cut, full in zip(data.train, whole, strict=True):
        assert cut.input_ids[cut.branches[0] :].tolist() == full.input_ids[full.branches[0] :].tolist()
    assert report.targets == sum(int((sample.weights > 0).sum()) for sample in whole)


def test_feedback(tmp_path: Path) -> None:
    rows = [{**row, "label": n % 3 == 0} for n, row in enumerate(QUESTIONS)]
    bad = [{**QUESTIONS[0], "label": None}, {**QUESTIONS[0], "label": "yes"}, QUESTIONS[0]]
    data = prepared("kto", tmp_path / "cache", labelled(tmp_path, rows + bad))
    assert [sample.label for sample in data.train] == [1, 0, 0, 1, 0, 0, 1, 0]
    assert data.train.num_branches.tolist() == [1] * 8
    assert data.reports[0].dropped == {"no label": 2, "label is not true or false": 1}
    assert data.reports[0].targets == sum(len(row["chosen"]) + 1 for row in QUESTIONS)


def test_pairs_as_feedback_stay_together(tmp_path: Path) -> None:
    data = prepared("kto", tmp_path / "cache", dataset(tmp_path, QUESTIONS, PAIRED), dev_split=2)
    assert (data.reports[0].rows, data.reports[0].samples) == (8, 16)
    dev = data.eval["dev"]
    assert (len(data.train), len(dev)) == (12, 4)
    for table in (data.train, dev):
        assert [sample.label for sample in table] == [1.0, 0.0] * (len(table) // 2)
        assert [sample.index for sample in table[::2]] == [sample.index for sample in table[1::2]]
    assert sorted({sample.index for sample in [*data.train, *dev]}) == list(range(8))


def test_several_sets_first_rows_and_a_held_out_part(tmp_path: Path) -> None:
    first = dataset(tmp_path, QUESTIONS, PAIRED, "first")
    second = dataset(tmp_path, QUESTIONS[::-1], PAIRED, "second")
    data = prepared("dpo", tmp_path / "cache", first, second, max_samples=5, dev_split=0.3)
    held_out = set(np.random.default_rng(42).permutation(10)[:3].tolist())
    names = ["first"] * 5 + ["second"] * 5
    found = {(sample.source, sample.index) for sample in data.eval["dev"]}
    assert found == {(names[row], row % 5) for row in held_out}
    assert len(data.train) == 7 and [report.rows for report in data.reports] == [5, 5]
    evaluated = prepared("dpo", tmp_path / "cache", first, eval=(second,))
    assert len(evaluated.eval["second"]) == 8 and evaluated.eval["second"].num_branches.tolist() == [2] * 8


def test_the_gate_reads_both_answers(tmp_path: Path) -> None:
    """The worse answer ends in a way that this template does not close."""
    source = CHATML.replace("<|im_end|>", "{{ '' if 'odd' in message['content'] else '<|im_end|>' }}")
    assert source != CHATML
    (tmp_path / "odd.jinja").write_text(source)
    odd = [{**QUESTIONS[0], "rejected": "odd"}]
    with pytest.raises(DataError, match="data set 'rows', row 0: the stop token is not supervised"):
        prepared(
            "dpo", tmp_path / "cache", dataset(tmp_path, odd, PAIRED), template=str(tmp_path / "odd.jinja")
        )


# --------------------------------------------------------------------------------------------------
# Real data


def test_real_pairs(shared_data: Path, tmp_path: Path) -> None:
    data = prepared("dpo", tmp_path, "dpo_en_demo", directory=str(shared_data), max_length=100_000)
    (report,) = data.reports
    source = json.loads((shared_data / "dpo_en_demo.json").read_text())
    assert (report.rows, report.samples, report.lost_rows) == (300, 300, 0)
    answers = [len(row[side]["value"].encode()) + 1 for row in source for side in ("chosen", "rejected")]
    assert report.targets == sum(answers)
    assert data.train.num_branches.tolist() == [2] * 300
    short = prepared("dpo", tmp_path, "dpo_en_demo", directory=str(shared_data), max_length=2048)
    kept = data.train.row_lengths <= 2048
    assert short.reports[0].dropped == {"longer than max_length": 300 - int(kept.sum())}
    assert [sample.index for sample in short.train] == np.flatnonzero(kept).tolist()


def test_real_feedback(shared_data: Path, tmp_path: Path) -> None:
    data = prepared("kto", tmp_path, "kto_en_demo", directory=str(shared_data), max_length=100_000)
    (report,) = data.reports
    source = json.loads((shared_data / "kto_en_demo.json").read_text())
    assert (report.rows, report.samples, report.lost_rows) == (300, 300, 0)
    assert [sample.label for sample in data.train] == [float(row["label"]) for row in source]
    assert sum(sample.label for sample in data.train) == 150
    answers = [len(row["messages"][-1]["content"].encode()) + 1 for row in source]
    assert (data.train.lengths - data.train.prompt_lengths).tolist() == answers


def test_real_pairs_as_feedback(shared_data: Path, tmp_path: Path) -> None:
    data = prepared("kto", tmp_path, "dpo_en_demo", directory=str(shared_data), max_length=100_000)
    assert len(data.train) == 600
    assert [sample.label for sample in data.train] == [1.0, 0.0] * 300
