"""The tokenized cache, its tables and reports, and the data path that fills it."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from luthier.data import cache as cache_module
from luthier.data.cache import TokenCache, content_key, default_folder
from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.packing import best_fit
from luthier.data.prepare import Preparation, PreparedData, prepare, split_rows
from luthier.data.report import DataReport, ReportBuilder, check_max_lost, format_reports
from luthier.data.table import SampleTable, write_table
from luthier.data.template import load_template
from luthier.recipe.schema import DataSpec, PtSpec, SftSpec
from luthier.stages.pt import Pretraining
from luthier.stages.sft import SupervisedFineTuning
from luthier.types import DataError, Encoded, Lost, Sample
from tiny_tokenizers import byte_level

TEMPLATE_TOKENS = ("<|im_start|>", "<|im_end|>")


def sample(n: int, index: int, source: str = "demo", weight: float = 1.0) -> Sample:
    return Sample(np.arange(n, dtype=np.int32) + index, np.full(n, weight, np.float32), source, index)


def same(a: Sample, b: Sample) -> bool:
    return (
        np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.weights, b.weights)
        and (a.source, a.index) == (b.source, b.index)
    )


# --------------------------------------------------------------------------------------------------
# Tables


def test_a_table_gives_back_its_samples_from_memory_and_from_a_file(tmp_path: Path) -> None:
    samples = [sample(1 + i % 7, i) for i in range(2500)]
    held = SampleTable.of(enumerate(samples), "demo")
    assert write_table(tmp_path / "t.arrow", enumerate(samples)) == 2500
    mapped = SampleTable.open(tmp_path / "t.arrow", "demo")
    for table in (held, mapped):
        assert len(table) == 2500
        assert all(same(a, b) for a, b in zip(table, samples, strict=True))
        assert_array_equal(table.lengths, [len(s) for s in samples])
        assert_array_equal(table.rows, np.arange(2500))
        assert same(table[-1], samples[-1]) and len(table[3:5]) == 2
    with pytest.raises(IndexError):
        mapped[2500]
    with pytest.raises(ValueError, match="read-only"):
        mapped[0].input_ids[0] = 1


def test_tables_are_put_together_and_rows_taken_out() -> None:
    # rows 0 and 2 of the first set gave samples, row 1 gave none, row 2 gave two
    first = SampleTable.of([(0, sample(2, 0, "a")), (2, sample(3, 2, "a")), (2, sample(4, 2, "a"))], "a")
    second = SampleTable.of([(0, sample(5, 0, "b")), (1, sample(6, 1, "b"))], "b")
    both = SampleTable.concat([first, second], [3, 2])
    assert_array_equal(both.rows, [0, 2, 2, 3, 4])
    assert [s.source for s in both] == ["a", "a", "a", "b", "b"]
    taken = both.take_rows(np.array([3, 1, 2]))
    assert_array_equal(taken.lengths, [5, 3, 4])
    assert_array_equal(taken.rows, [0, 2, 2])
    again = taken.take_rows(np.array([2]))
    assert_array_equal(again.lengths, [3, 4])
    assert same(again[1], both[2])
    assert len(SampleTable.concat([], [])) == 0


def test_mixed_tables_keep_each_source() -> None:
    samples = [sample(2, 0, "a"), sample(3, 5, "b"), sample(1, 6, "b"), sample(2, 1, "a")]
    table = SampleTable.of_mixed(samples)
    assert all(same(a, b) for a, b in zip(table, samples, strict=True))
    assert_array_equal(table.rows, np.arange(4))


# --------------------------------------------------------------------------------------------------
# Reports

ENCODED = [
    Encoded((sample(4, 0),)),
    Encoded(lost=Lost("no answer")),
    Encoded((sample(6, 2), sample(2, 2)), Lost(tokens=5, answers=1)),
    Encoded((sample(3, 3, weight=0),)),
    Encoded(lost=Lost("too odd")),
    Encoded(lost=Lost("no answer")),
]


def report_of(encoded: list[Encoded], name: str = "demo") -> DataReport:
    builder = ReportBuilder(name)
    for index, row in enumerate(encoded):
        builder.add(index, row)
    return builder.report()


def test_a_report_counts_every_row_once() -> None:
    report = report_of(ENCODED)
    assert (report.rows, report.samples, report.tokens, report.targets) == (6, 4, 15, 3 + 5 + 1)
    assert report.dropped == {"no answer": 2, "too odd": 1} and report.examples == {
        "no answer": [1, 5],
        "too odd": [4],
    }
    assert (report.cut_rows, report.cut_tokens, report.lost_answers, report.unsupervised) == (1, 5, 1, 1)
    assert report.lost_rows == 5 and report.lost_share == 5 / 6
    assert report.lengths == {"p50": 3, "p90": 4, "p99": 4, "p100": 6}
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_losses_are_told_and_judged() -> None:
    report, good = report_of(ENCODED), report_of(ENCODED[:1], "good")
    assert report.losses() == (
        "demo: 5 of 6 rows lost: 2 dropped (no answer; row 1, 5), 1 dropped (too odd; row 4), "
        "1 cut (5 tokens, 1 whole answers), 1 without any target"
    )
    assert good.losses() == ""
    check_max_lost([report, good], None)
    check_max_lost([report], 0.84)
    with pytest.raises(
        DataError, match=r"^demo: 5 of 6 rows lost.*more than data\.max_lost allows \(80\.00%\)"
    ):
        check_max_lost([report, good], 0.8)
    table = format_reports([report, good]).splitlines()
    assert table[1].split() == ["demo", "6", "3", "1", "1", "4", "15", "9", "3", "4", "4", "6"]
    assert table[3] == report.losses() and len(table) == 4
    assert report_of([]).lost_share == 0


# --------------------------------------------------------------------------------------------------
# Entries


def rows(n: int = 3) -> Iterator[tuple[int, Encoded]]:
    return ((i, Encoded((sample(i + 1, i),))) for i in range(n))


def test_an_entry_is_found_again_under_any_name(tmp_path: Path) -> None:
    store = TokenCache(tmp_path / "cache")
    assert store.get("k", "demo") is None
    table, report = store.put("k", "demo", rows())
    assert [len(s) for s in table] == [1, 2, 3] and report.rows == 3
    found = store.get("k", "other")
    assert found is not None
    assert found[0][2].source == "other" and found[1] == replace(report, dataset="other")
    assert [entry.name for entry in store.folder.iterdir()] == ["k"]


@pytest.mark.parametrize("file", ["tokens.arrow", "report.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, file: str, damage: str) -> None:
    store = TokenCache(tmp_path)
    store.put("k", "demo", rows())
    path = tmp_path / "k" / file
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:20] if damage == "cut" else bytes(len(content)))
    assert store.get("k", "demo") is None
    table, _ = store.put("k", "demo", rows())
    assert [len(s) for s in table] == [1, 2, 3]


def test_an_interrupted_entry_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[int, Encoded]]:
        yield from rows()
        raise DataError("row 3 is bad")

    store = TokenCache(tmp_path)
    with pytest.raises(DataError, match="row 3 is bad"):
        store.put("k", "demo", failing())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path) -> None:
    fresh, stale, busy = (tmp_path / f".0123456789abcdef-{pid}-00000000" for pid in (1, 2, 3))
    for folder in (fresh, stale, busy):
        folder.mkdir()
        (folder / "tokens.arrow").write_bytes(b"ARROW1")
    day_ago = time.time() - 25 * 3600
    for path in (stale / "tokens.arrow", stale, busy):  # to the third, tokens are still being added
        os.utime(path, (day_ago, day_ago))
    TokenCache(tmp_path).put("k", "demo", rows())
    assert {entry.name for entry in tmp_path.iterdir()} == {"k", fresh.name, busy.name}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the tokenized cache in .*file.*data\.cache"):
        TokenCache(tmp_path / "file").put("k", "demo", rows())


def test_who_comes_second_uses_what_is_there(tmp_path: Path) -> None:
    store = TokenCache(tmp_path)

    def overtaken() -> Iterator[tuple[int, Encoded]]:
        yield from rows()
        TokenCache(tmp_path).put("k", "demo", rows())

    table, _ = store.put("k", "demo", overtaken())
    assert [len(s) for s in table] == [1, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["k"]


def test_keys_follow_content_and_not_order() -> None:
    assert content_key({"a": 1, "b": [2, "\ud800"]}) == content_key({"b": [2, "\ud800"], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("LUTHIER_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "luthier" / "tokens"


# --------------------------------------------------------------------------------------------------
# The whole path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def alpaca(prefix: str, n: int) -> str:
        return json.dumps([{"instruction": f"{prefix}{i}?", "output": "yes " * (i + 1)} for i in range(n)])

    (tmp_path / "a.json").write_text(alpaca("a", 12))
    (tmp_path / "b.json").write_text(alpaca("b", 5))
    (tmp_path / "mixed.jsonl").write_text(
        "\n".join(json.dumps({"instruction": "q", "output": out}) for out in ["x", None, "", 3, "y"])
    )
    (tmp_path / "lines.txt").write_text("one two three\n\nfour five\n")
    return tmp_path


def prepared(
    folder: Path, *, stage: str = "sft", seed: int = 3, progress: Any = None, **spec: Any
) -> PreparedData:
    data = DataSpec(
        **{"directory": str(folder), "cache": str(folder / "cache"), "template": "chatml", **spec}
    )
    options = EncodeOptions.of(data, stage)
    part = Pretraining(PtSpec(), options) if stage == "pt" else SupervisedFineTuning(SftSpec(), options)
    template = load_template(byte_level(TEMPLATE_TOKENS), data)
    kind: Any = "text" if stage == "pt" else "conversation"
    how = Preparation(part.encode, template, kind, {"stage": stage, **asdict(options)}, seed)
    return prepare(data, how, progress)


def counted_encodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counting(row: Any, template: Any, options: EncodeOptions) -> Encoded:
        calls.append(row.index)
        return sft_sample(row, template, options)

    monkeypatch.setattr("luthier.stages.sft.sft_sample", counting)
    return calls


def test_sets_are_put_one_after_the_other_and_evaluated_by_name(folder: Path) -> None:
    seen: list[tuple[str, int]] = []
    data = prepared(
        folder, train=["a.json", "b.json"], eval=["mixed.jsonl"], progress=lambda *at: seen.append(at)
    )
    assert [(s.source, s.index) for s in data.train] == [("a", i) for i in range(12)] + [
        ("b", i) for i in range(5)
    ]
    assert list(data.eval) == ["mixed"] and [s.index for s in data.eval["mixed"]] == [0, 4]
    assert [r.dataset for r in data.reports] == ["a", "b", "mixed"]
    assert data.reports[2].dropped == {"no answer": 1, "no answer to learn": 1, "answer is not text": 1}
    assert seen[-1] == ("mixed", 5) and ("a", 12) in seen
    assert data.train.groups is None


def test_what_is_unchanged_is_not_tokenized_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_encodes(monkeypatch)
    first = prepared(folder, train=["a.json"])
    assert len(calls) == 12
    second = prepared(folder, train=["a.json"], dev_split=0.25)
    assert len(calls) == 12 and second.fingerprints == first.fingerprints
    (folder / "copy.json").write_bytes((folder / "a.json").read_bytes())
    assert prepared(folder, train=["copy.json"]).train[0].source == "copy"
    assert len(calls) == 12
    assert all(
        same(replace(a, source="x"), replace(b, source="x"))
        for a, b in zip(first.train, prepared(folder, train=["copy.json"]).train, strict=True)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 64},
        {"overflow": "truncate"},
        {"train_on_prompt": True},
        {"mask_history": True},
        {"train_after_stop": True},
        {"parse_special_tokens": True},
        {"default_system": "s"},
        {"template": "default"},
        {"max_samples": 3},
    ],
)
def test_whatever_decides_the_tokens_changes_the_key(folder: Path, change: dict[str, Any]) -> None:
    before = prepared(folder, train=["a.json"]).fingerprints["a"]
    assert prepared(folder, train=["a.json"], **change).fingerprints["a"] != before


def test_data_and_code_change_the_key_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [prepared(folder, train=["a.json"]).fingerprints["a"]]
    (folder / "a.json").write_text((folder / "a.json").read_text().replace("a0?", "a0!"))
    data = prepared(folder, train=["a.json"])
    keys.append(data.fingerprints["a"])
    monkeypatch.setattr("luthier.data.prepare.CODE_VERSION", cache_module.CODE_VERSION + 1)
    keys.append(prepared(folder, train=["a.json"]).fingerprints["a"])
    assert len(set(keys)) == 3


def test_several_workers_give_the_same_table(folder: Path) -> None:
    one = prepared(folder, train=["a.json", "b.json"], cache=str(folder / "one"))
    two = prepared(folder, train=["a.json", "b.json"], cache=str(folder / "two"), workers=2)
    assert len(one.train) == len(two.train) and one.reports == two.reports
    assert all(same(a, b) for a, b in zip(one.train, two.train, strict=True))


def test_a_dev_split_follows_numpys_permutation(folder: Path) -> None:
    order = np.random.default_rng(3).permutation(17).tolist()
    names = [("a", i) for i in range(12)] + [("b", i) for i in range(5)]
    data = prepared(folder, train=["a.json", "b.json"], dev_split=0.2)
    assert [(s.source, s.index) for s in data.eval["dev"]] == [names[i] for i in order[:4]]
    assert [(s.source, s.index) for s in data.train] == [names[i] for i in order[4:]]
    by_number = prepared(folder, train=["a.json", "b.json"], dev_split=4)
    assert_array_equal(by_number.train.lengths, data.train.lengths)
    with pytest.raises(DataError, match=r"holds out 17 of 17 rows"):
        split_rows(17, 17, 0)


def test_packing_groups_whole_samples(folder: Path) -> None:
    data = prepared(folder, train=["a.json"], packing=True, max_length=64)
    assert data.train.groups == best_fit(data.train.lengths.tolist(), 64)
    assert len(data.train.groups) < len(data.train)


def test_documents_come_from_lines(folder: Path) -> None:
    data = prepared(folder, stage="pt", train=["lines.txt"])
    assert [s.index for s in data.train] == [0, 2]
    assert data.reports[0].dropped == {"empty text": 1}
    assert all(s.weights.all() for s in data.train)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"train": ["a.json", "a.json"]}, "data.train: two data sets are called 'a'"),
        ({"train": ["mixed.jsonl"], "max_length": 2}, r"nothing to train on: mixed: 5 of 5 rows lost"),
        (
            {"train": ["a.json"], "dev_split": 3, "eval": [{"name": "dev", "file_name": "b.json"}]},
            "two data sets are called 'dev'",
        ),
        (
            {"train": [{"file_name": "a.json", "ranking": True}]},
            "preference pairs .* stage 'sft' does not learn from",
        ),
        ({"train": ["a.json"], "overflow": "error", "max_length": 20}, r"a, row \d+: \d+ tokens, more than"),
    ],
)
def test_data_that_cannot_be_used(folder: Path, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(folder, **spec)
    assert not list((folder / "cache").glob(".*"))


def _prepare_in_a_process(folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    store = TokenCache(Path(folder))
    table, _ = store.put("k", "demo", rows(2000))
    assert len(table) == 2000


def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_prepare_in_a_process, args=(str(tmp_path),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["k"]
