"""`luthier evaluate --task`: benchmarks in the layouts of MMLU, C-Eval and CMMLU, against transformers alone."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from luthier.answering import parts_of
from luthier.cli import app
from luthier.evaluate_verb import evaluate
from luthier.evaluating.benchmark import read_benchmark
from luthier.evaluating.choices import Asking, Layout, benchmark_prompts
from luthier.trained.template import trained_template
from luthier.types import DataError
from tests.tiny import chat_model

SUBJECTS = {
    "sums": {"name": "sums", "category": "STEM"},
    "words": {"name": "small words", "category": "Other"},
    "counts": {"name": "counts", "category": "STEM"},
}
OPENING = {
    "en": "The following are multiple choice questions (with answers) about {}.\n\n",
    "zh": "以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n",
}
ANSWER = {"en": "\nAnswer:", "zh": "\n答案："}
Row = list[str]


def rows(subject: str, split: str, num: int) -> list[Row]:
    rng = np.random.default_rng(len(subject) * 10 + len(split))
    found = []
    for k in range(num):
        a, b = rng.integers(1, 9, 2).tolist()
        choices = [str(a + b + shift) for shift in rng.permutation(4).tolist()]
        found.append([f"{subject} {k}: {a}, and {b}?", *choices, "ABCD"[choices.index(str(a + b))]])
    return found


def as_csv(lines: Sequence[Sequence[str]]) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows(lines)
    return stream.getvalue()


def write_mmlu(root: Path, sizes: dict[str, int]) -> None:
    """No header, in an archive below data/."""
    (root / "mmlu").mkdir(parents=True)
    (root / "mmlu" / "mapping.json").write_text(json.dumps(SUBJECTS))
    with zipfile.ZipFile(root / "mmlu" / "mmlu.zip", "w") as archive:
        for subject in SUBJECTS:
            for split, num in sizes.items():
                text = as_csv(rows(subject, split, num))
                archive.writestr(f"data/{split}/{subject}_{split}.csv", text)


def write_ceval(root: Path, sizes: dict[str, int]) -> None:
    """A header with numbers before and explanations behind, in folders."""
    (root / "ceval").mkdir(parents=True)
    (root / "ceval" / "mapping.json").write_text(json.dumps(SUBJECTS))
    for subject in SUBJECTS:
        for split, num in sizes.items():
            lines = [[str(k), *row, "because"] for k, row in enumerate(rows(subject, split, num))]
            file = root / "ceval" / split / f"{subject}_{split}.csv"
            file.parent.mkdir(exist_ok=True)
            head = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
            file.write_text(as_csv([head, *lines]), encoding="utf-8")


def write_cmmlu(root: Path, sizes: dict[str, int]) -> None:
    """A header with capitals and an unnamed number, files named by subject alone."""
    (root / "cmmlu").mkdir(parents=True)
    (root / "cmmlu" / "mapping.json").write_text(json.dumps(SUBJECTS))
    with zipfile.ZipFile(root / "cmmlu" / "cmmlu.zip", "w") as archive:
        for subject in SUBJECTS:
            for split, num in sizes.items():
                lines = [[str(k), *row] for k, row in enumerate(rows(subject, split, num))]
                head = ["", "Question", "A", "B", "C", "D", "Answer"]
                archive.writestr(f"{split}/{subject}.csv", "\ufeff" + as_csv([head, *lines]))


def asked(row: Row, lang: str) -> str:
    return row[0] + "".join(f"\n{x}. {text}" for x, text in zip("ABCD", row[1:5], strict=True)) + ANSWER[lang]


def direct(
    folder: Path, split: str, lang: str, num_shots: int, sizes: dict[str, int], chat: bool
) -> tuple[dict[str, str], dict[str, list[tuple[int, ...]]]]:
    """The letters by transformers alone, and the prompts: the chat template's text, one question at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    between = " " if lang == "en" and not chat else ""
    letters = [tokenizer(between + x, add_special_tokens=False)["input_ids"] for x in "ABCD"]
    found, prompts = {}, {}
    for subject, entry in SUBJECTS.items():
        answers, prompts[subject] = "", []
        for row in rows(subject, split, sizes[split]):
            shots = rows(subject, "dev", sizes["dev"])[:num_shots]
            if chat:
                turns = []
                for shot in [*shots, row]:
                    turns += [{"role": "user", "content": asked(shot, lang)}]
                    turns += [{"role": "assistant", "content": shot[5]}] if shot is not row else []
                turns[0]["content"] = OPENING[lang].format(entry["name"]) + turns[0]["content"]
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            else:
                before = "".join(
                    asked(s, lang) + (" " if lang == "en" else "") + s[5] + "\n\n" for s in shots
                )
                text = OPENING[lang].format(entry["name"]) + before + asked(row, lang)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] + letters[0][:-1]
            prompts[subject].append(tuple(ids))
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            answers += "ABCD"[int(logits[[one[-1] for one in letters]].argmax())]
        found[subject] = answers
    return found, prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = chat_model(tmp_path_factory.mktemp("model") / "base", max_position_embeddings=2048)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in loaded.parameters():
            if parameter.ndim == 2:
                parameter.mul_(25.0)  # letters apart by more than rounding
    loaded.save_pretrained(folder)
    return folder


SIZES = {"dev": 3, "val": 4, "test": 6}
CASES = [
    (write_mmlu, "mmlu_test", "test", "en", "chat", 2),
    (write_mmlu, "mmlu_validation", "val", "en", "text", 3),
    (write_ceval, "ceval_validation", "val", "zh", "chat", 3),
    (write_cmmlu, "cmmlu_test", "test", "zh", "text", 0),
]


@pytest.mark.parametrize(("write", "task", "split", "lang", "layout", "num_shots"), CASES)
def test_the_letters_are_those_of_transformers_alone(
    model: Path, tmp_path: Path, write: Any, task: str, split: str, lang: str, layout: Layout, num_shots: int
) -> None:
    write(tmp_path, SIZES)
    expected, prompts = direct(model, split, lang, num_shots, SIZES, layout == "chat")
    benchmark = read_benchmark(tmp_path, task, num_shots=num_shots)
    template = trained_template(parts_of(model), lambda text: None)
    ours = benchmark_prompts(benchmark, Asking(lang, layout, num_shots), template, None)
    assert {name: [one.ids for one in subject] for name, subject in ours.items()} == prompts
    options = ["--task-dir", str(tmp_path), "--n-shot", str(num_shots), "--lang", lang, "--layout", layout]
    found = []
    for passes in ("1", "4000"):  # one question at a time, and all with what they begin with computed once
        more = [*options, "--tokens-per-pass", passes, "--json"]
        done = CliRunner().invoke(app, ["evaluate", str(model), "--task", task, *more])
        assert done.exit_code == 0, done.output
        found.append(json.loads(done.stdout)["benchmarks"][0])
    assert found[0] == found[1]
    target = found[0]["target"]
    assert {name: one["answers"] for name, one in target["subjects"].items()} == expected
    assert len(set("".join(expected.values()))) > 1  # not one letter for everything
    right = {
        s: [a == row[5] for a, row in zip(expected[s], rows(s, split, SIZES[split]), strict=True)]
        for s in SUBJECTS
    }
    for subject, one in target["subjects"].items():
        assert (one["right"], one["questions"]) == (sum(right[subject]), SIZES[split])
    stem = right["sums"] + right["counts"]
    assert target["categories"]["STEM"]["accuracy"] == pytest.approx(np.mean(stem))
    every = [x for one in right.values() for x in one]
    assert target["average"]["accuracy"] == pytest.approx(np.mean(every))
    low, high = target["average"]["interval"]
    assert low < np.mean(every) < high


def test_examples_that_do_not_fit_are_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    small = chat_model(tmp_path / "small", max_position_embeddings=260)
    write_mmlu(tmp_path, SIZES)
    target = evaluate(small, tasks=["mmlu_test"], task_dir=tmp_path, n_shot=3, quiet=True).report[
        "benchmarks"
    ][0]["target"]
    assert target["shots_left_out"] > 0
    tiny = chat_model(tmp_path / "tiny", max_position_embeddings=64)
    with pytest.raises(
        DataError, match=r"sums_test.csv, line 1: the question has \d+ tokens, more than .* 64"
    ):
        evaluate(tiny, tasks=["mmlu_test"], task_dir=tmp_path, quiet=True)


def test_side_by_side(model: Path, tmp_path: Path) -> None:
    write_mmlu(tmp_path, SIZES)
    other = chat_model(tmp_path / "other", max_position_embeddings=2048)
    how: dict[str, Any] = {"tasks": ["mmlu_test"], "task_dir": tmp_path, "n_shot": 1, "quiet": True}
    result = evaluate(model, against=str(other), **how)
    (one,) = result.report["benchmarks"]
    apart = one["difference"]["average"]
    assert apart["value"] == pytest.approx(
        one["target"]["average"]["accuracy"] - one["against"]["average"]["accuracy"]
    )
    assert apart["interval"][0] <= apart["value"] <= apart["interval"][1]
    alone = evaluate(other, **how).report["benchmarks"][0]["target"]
    assert one["against"] == alone
    lines = result.text().splitlines()
    assert lines[-1].startswith("average") and "difference" in lines[0]
    # A model beside itself: no difference, in no resample.
    same = evaluate(model, against=str(model), **how).report["benchmarks"][0]["difference"]["average"]
    assert same == {"value": 0.0, "interval": [0.0, 0.0], "questions": 18} or same["interval"] == (0.0, 0.0)


def test_what_is_wrong_with_the_files_is_named(model: Path, tmp_path: Path) -> None:
    write_ceval(tmp_path, SIZES)
    root = tmp_path / "ceval"
    how: dict[str, Any] = {"task_dir": tmp_path, "n_shot": 1, "quiet": True}
    withheld = root / "test" / "sums_test.csv"
    withheld.write_text("id,question,A,B,C,D\n0,q,1,2,3,4\n")
    broken = root / "val" / "words_val.csv"
    cases: list[tuple[Any, str]] = [
        ("id,question,A,B,C,D,answer\n0,q,1,2,3,4,E\n", r"words_val.csv, line 2: the answer .* found 'E'"),
        ("question,A,B\nq,1,2\n", r"words_val.csv, line 1: expected the columns .* found 3 columns"),
        ("id,question,A,B,C,D,answer\n0,q,1,2\n", r"words_val.csv, line 2: 4 cells, and 7 are expected"),
        (b"\xff\xfe\x00", "words_val.csv: not UTF-8 at byte 0"),
        ('a,"b\n', "words_val.csv, line .*: not CSV"),
        (None, "no questions of 'words', split validation: expected val/words_val.csv"),
    ]
    with pytest.raises(
        DataError, match=r"line 2: .*the answers of this split are not in the file; .* \(validation\)"
    ):
        evaluate(model, tasks=["ceval_test"], **how)
    for content, message in cases:
        if content is None:
            broken.unlink()
        else:
            broken.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=message):
            evaluate(model, tasks=["ceval_validation"], **how)
    (root / "mapping.json").write_text('{"sums": {"name": "x"}}')
    with pytest.raises(DataError, match=r'mapping.json: sums: expected \{"name"'):
        evaluate(model, tasks=["ceval_validation"], **how)
    with pytest.raises(DataError, match=r"nothing/mapping.json does not exist: --task-dir"):
        evaluate(model, tasks=["nothing_test"], **how)
