"""`luthier evaluate --lm-eval`: lm-evaluation-harness on our engine gives what it gives on transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from luthier.cli import app
from luthier.evaluate_verb import evaluate
from luthier.run import train
from luthier.types import RecipeError
from tests.tiny import chat_model, write_alpaca

try:
    import lm_eval  # noqa: F401

    INSTALLED = True
except ImportError:
    INSTALLED = False

needs_lm_eval = pytest.mark.skipif(
    not INSTALLED, reason="lm-eval is not installed: pip install lm-eval==0.4.13"
)

TASKS = {
    "luthier_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": 2,
    },
    "luthier_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "luthier_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{wanted}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
NAMES = list(TASKS)


def write_tasks(folder: Path, wanted: list[str]) -> Path:
    rows = [
        {
            "question": f"What comes after {n}?",
            "choices": [f" {n + 1}", f" {n}", f" not {n - 1}"],
            "answer": n % 3,
            "text": f"{n} is followed by {n + 1}. " * (n % 4 * 6 + 1),
            "wanted": wanted[n],
        }
        for n in range(len(wanted))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir(exist_ok=True)
    for name, task in TASKS.items():
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        }
        tree = {"task": name, **data, "test_split": "test", "fewshot_split": "test", **task}
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(tree))
    return folder / "tasks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return chat_model(tmp_path_factory.mktemp("model") / "base", initializer_range=0.3)


def theirs(model: Path, tasks: Path, **how: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = AutoModelForCausalLM.from_pretrained(model)
    # One less than the context: our windows hold the last target too, which theirs leave out of the input.
    lm = HFLM(pretrained=loaded, tokenizer=str(model), batch_size=2, max_length=255)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=NAMES, task_manager=manager, bootstrap_iters=1000, **how)
    assert found is not None
    return found


@needs_lm_eval
@pytest.mark.parametrize("chat", [False, True])
def test_the_harness_finds_what_it_finds_on_transformers(model: Path, tmp_path: Path, chat: bool) -> None:
    tasks = write_tasks(tmp_path, ["?"] * 12)
    first = theirs(model, tasks, apply_chat_template=chat)
    answers = {one["doc_id"]: one["resps"][0][0] for one in first["samples"]["luthier_answers"]}
    assert len(set(answers.values())) > 1
    # Every second row wants what transformers generates: so exact match is a half where we generate the same.
    wanted = [answers[n] if n % 2 else "?" for n in range(12)]
    tasks = write_tasks(tmp_path, wanted)
    expected = theirs(model, tasks, apply_chat_template=chat)["results"]
    args = [
        "evaluate",
        str(model),
        "--tasks-folder",
        str(tasks),
        *(["--lm-eval-chat"] if chat else []),
        "--json",
    ]
    for passes in ("1", "5000"):
        named = [word for name in NAMES for word in ("--lm-eval", name)]
        done = CliRunner().invoke(app, [*args, *named, "--tokens-per-pass", passes])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)["lm_eval"]["target"]
        for name in NAMES:
            for metric, one in found[name].items():
                assert one["value"] == pytest.approx(expected[name][f"{metric},none"], rel=1e-4), (
                    name,
                    metric,
                )
        assert set(found["luthier_choices"]) == {"acc", "acc_norm"}
        assert set(found["luthier_rolling"]) == {"word_perplexity", "bits_per_byte"}
        assert found["luthier_answers"]["exact_match"]["value"] == 0.5
        assert found["luthier_choices"]["acc"]["stderr"] > 0


@needs_lm_eval
def test_beside_the_base(tmp_path: Path) -> None:
    base = chat_model(tmp_path / "base", initializer_range=0.3)
    write_alpaca(tmp_path / "rows.json", 8)
    recipe = {
        "model": {"path": str(base)},
        "data": {"train": [str(tmp_path / "rows.json")], "max_length": 96, "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 4},
        "optim": {"lr": 1e-2},
        "train": {"output": str(tmp_path / "run"), "max_steps": 2, "save_every": None, "plots": False},
    }
    train(recipe, quiet=True)
    tasks = write_tasks(tmp_path, ["?"] * 6)
    how: dict[str, Any] = {"lm_eval": NAMES, "tasks_folder": tasks, "quiet": True}
    beside = evaluate(tmp_path / "run", against="base", **how)
    alone = evaluate(base, **how).report["lm_eval"]["target"]
    found = beside.report["lm_eval"]
    for name in NAMES:
        for metric, one in alone[name].items():
            assert found["against"][name][metric]["value"] == pytest.approx(one["value"], rel=1e-5)
    mine = found["target"]["luthier_rolling"]["bits_per_byte"]["value"]
    assert mine != pytest.approx(alone["luthier_rolling"]["bits_per_byte"]["value"], rel=1e-4)
    assert "luthier_rolling" in beside.text()


@needs_lm_eval
def test_unknown_tasks_are_refused(model: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path, ["?"])
    with pytest.raises(RecipeError, match=r"no such task; did you mean luthier_choices"):
        evaluate(model, lm_eval=["luthier_choice"], tasks_folder=tasks, quiet=True)
    with pytest.raises(RecipeError, match=r"--tasks-folder .*: no such folder"):
        evaluate(model, lm_eval=NAMES, tasks_folder=tmp_path / "nothing", quiet=True)


def test_without_lm_eval_the_line_that_installs_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "lm_eval", None
    )  # which is what Python keeps of a module that is not there
    with pytest.raises(
        RecipeError, match=r"--lm-eval needs the package lm-eval.*pip install 'luthier\[lm-eval\]'"
    ):
        evaluate(model, lm_eval=["hellaswag"], quiet=True)
