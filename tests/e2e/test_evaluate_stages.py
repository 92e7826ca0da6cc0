"""`luthier evaluate RUN`: the evaluation sets of every stage, and what its options weigh, from the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.evaluate_verb import evaluate
from luthier.run import train
from tests.tiny import (
    FEEDBACK_COLUMNS,
    PAIR_COLUMNS,
    chat_model,
    write_feedback,
    write_pairs,
)


def run_of(folder: Path, stage: dict[str, Any], data: dict[str, Any], **sections: Any) -> dict[str, float]:
    if not (folder / "base").is_dir():
        chat_model(folder / "base")
    settings = {"rows_per_device": 4, "max_steps": 2, "save_every": None, "plots": False}
    recipe = {
        "model": {"path": str(folder / "base")},
        "data": {"max_length": 96, "cache": str(folder / "cache"), "dev_split": 5, **data},
        "stage": stage,
        "method": {"type": "lora", "rank": 4},
        "optim": {"lr": 1e-2},
        "train": {"output": str(folder / "run"), **settings},
        **sections,
    }
    return train(recipe, quiet=True).metrics


def own(folder: Path, **how: Any) -> dict[str, dict[str, Any]]:
    report = evaluate(folder / "run", quiet=True, **how).report
    return {one["name"]: one["target"] for one in report["perplexity"]}


def test_pretraining(tmp_path: Path) -> None:
    """The stage's own windows and end tokens, not those of --perplexity."""
    texts = [{"text": f"{n} and {n + 1} are numbers. " * (n % 5 + 1)} for n in range(16)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    source = {"file_name": str(tmp_path / "texts.json"), "name": "texts", "columns": {"prompt": "text"}}
    metrics = run_of(tmp_path, {"type": "pt"}, {"train": [source], "max_length": 48})
    assert own(tmp_path)["dev"]["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    named = own(tmp_path, perplexity=["texts"])["texts"]
    assert named["kind"] == "text" and named["rows"] == 16 and named["bits_per_byte"] > 0
    # A window as long as the longest text is what no window is; a short one sees less.
    assert own(tmp_path, perplexity=["texts"], window=200)["texts"]["tokens"] == named["tokens"]


def test_weights_of_the_recipe(tmp_path: Path) -> None:
    """mask_history, label smoothing: perplexity is of the plain likelihood of what the stage weighs."""
    rows = [
        {"instruction": f"And {n}?", "output": str(n + 1), "history": [[f"Say {n}.", str(n)]]}
        for n in range(14)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    source = {"file_name": str(tmp_path / "rows.json"), "name": "turns", "columns": columns}
    data = {"train": [source], "mask_history": True}
    metrics = run_of(tmp_path, {"type": "sft", "label_smoothing": 0.1}, data)
    found = own(tmp_path)["dev"]
    assert found["perplexity"] == pytest.approx(metrics["eval_perplexity"], rel=1e-5)
    assert found["loss"] != pytest.approx(metrics["eval_loss"], rel=1e-3)
    named = own(tmp_path, perplexity=["turns"])["turns"]
    assert named["tokens"] == sum(len(row["output"]) + 1 for row in rows)  # the last answer and its end


def test_pairs_and_feedback(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.json", 16)
    source = {"file_name": str(tmp_path / "pairs.json"), "name": "pairs", **PAIR_COLUMNS}
    metrics = run_of(tmp_path, {"type": "dpo"}, {"train": [source]})
    found = own(tmp_path)
    for title in ("chosen", "rejected"):
        one = found[f"dev ({title})"]
        assert one["rows"] == 5
        mean = -one["loss"] * one["tokens"] / one["rows"]
        assert mean == pytest.approx(metrics[f"eval_logps/{title}"], rel=1e-5)
    assert list(own(tmp_path, perplexity=["pairs"])) == ["pairs (chosen)"]


def test_feedback(tmp_path: Path) -> None:
    write_feedback(tmp_path / "rows.json", 16)
    columns = {**FEEDBACK_COLUMNS["columns"], "prompt": "instruction", "response": "output"}
    source = {"file_name": str(tmp_path / "rows.json"), "name": "rows", "columns": columns}
    metrics = run_of(tmp_path, {"type": "kto"}, {"train": [source], "dev_split": 8})
    found = own(tmp_path)
    for title, logged in (("desirable", "chosen"), ("undesirable", "rejected")):
        one = found[f"dev ({title})"]
        mean = -one["loss"] * one["tokens"] / one["rows"]
        assert mean == pytest.approx(metrics[f"eval_logps/{logged}"], rel=1e-5)
    assert sum(one["rows"] for one in found.values()) == 8
