"""LLaMA-Factory files that answer: one that trains and answers at evaluations, then one that predicts and one to chat
with, as that tool's users have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import luthier
from luthier.answering import open_model
from luthier.cli import app
from luthier.types import Conversation, Message, RecipeError
from tests.tiny import chat_model, write_alpaca

ROWS = 6


def write(file: Path, **keys: Any) -> Path:
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and the adapter that a file with predict_with_generate trained."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lf")
    chat_model(folder / "base", initializer_range=0.1)
    write_alpaca(folder / "rows.json", 12)
    rows = json.loads((folder / "rows.json").read_text())
    (folder / "held_out.json").write_text(json.dumps(rows[:ROWS]))
    info = {name: {"file_name": f"{name}.json"} for name in ("rows", "held_out")}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def shared(folder: Path) -> dict[str, Any]:
    return {"model_name_or_path": str(folder / "base"), "template": "qwen", "dataset_dir": str(folder)}


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    file = write(
        folder / "train.yaml",
        **shared(folder),
        stage="sft",
        do_train=True,
        dataset="rows",
        eval_dataset="held_out",
        eval_strategy="steps",
        eval_steps=3,
        predict_with_generate=True,
        generation_max_length=220,
        per_device_train_batch_size=4,
        num_train_epochs=1.0,
        learning_rate=0.01,
        output_dir=str(folder / "run"),
    )
    return luthier.train(file, quiet=True).output


def test_evaluations_of_a_training_answer(run: Path) -> None:
    logged = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    evaluations = [line for line in logged if "eval_loss" in line]
    assert evaluations and all({"eval_bleu-4", "eval_rouge-l"} <= line.keys() for line in evaluations)
    assert open_model(run).settings().max_length == 220


def test_a_file_that_predicts(run: Path, folder: Path) -> None:
    keys = {
        **shared(folder),
        "adapter_name_or_path": str(run),
        "stage": "sft",
        "do_predict": True,
        "predict_with_generate": True,
        "eval_dataset": "held_out",
        "do_sample": False,
        "max_new_tokens": 12,
        "per_device_eval_batch_size": 2,
        "output_dir": str(folder / "predicted"),
    }
    file = write(folder / "predict.yaml", **keys)
    with pytest.raises(RecipeError, match="this file answers a data set: run `luthier predict` with it"):
        luthier.train(file, quiet=True)
    done = CliRunner().invoke(app, ["predict", str(file)])
    assert done.exit_code == 0, done.output
    [lines] = (folder / "predicted").rglob("generated_predictions.jsonl")
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    rows = json.loads((folder / "held_out.json").read_text())
    assert [row["label"] for row in found] == [row["output"] for row in rows]
    opened = open_model(run)
    requests = [
        opened.request(
            Conversation((Message("user", row["instruction"]),)), temperature=0.0, max_new_tokens=12
        )
        for row in rows
    ]
    answers = dict(opened.engine.answers(requests))
    assert [row["predict"] for row in found] == [opened.text(answers[n]) for n in range(ROWS)]
    assert [row["prompt"] for row in found] == [opened.template.decode(one.prompt) for one in requests]


def test_a_file_to_chat_with(run: Path, folder: Path) -> None:
    keys = {**shared(folder), "adapter_name_or_path": str(run), "infer_backend": "huggingface"}
    del keys["dataset_dir"]
    file = write(folder / "chat.yaml", **keys, do_sample=False, max_new_tokens=12)
    with pytest.raises(RecipeError, match="run `luthier chat` or `luthier serve` with it"):
        luthier.train(file, quiet=True)
    opened = open_model(run)
    [(_, answer)] = opened.engine.answers(
        [opened.request(Conversation((Message("user", "Hi"),)), temperature=0.0, max_new_tokens=12)]
    )
    done = CliRunner().invoke(app, ["chat", str(file)], input="Hi\n")
    assert (done.exit_code, done.stdout) == (0, opened.text(answer) + "\n")
    done = CliRunner().invoke(app, ["chat", str(file), "max_new_tokens=3"], input="Hi\n")
    assert "cut at max_new_tokens=3" in done.stderr
    done = CliRunner().invoke(app, ["migrate", str(file)])
    assert done.exit_code == 0 and "max_new_tokens: 12  # translated from" in done.stdout
