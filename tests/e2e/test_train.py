"""Whole runs on a tiny model: what lands in the run directory, and that it means what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier
from luthier.types import CheckpointError, DataError
from tiny import chat_model, write_alpaca


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> dict[str, Any]:
    write_alpaca(tmp_path / "rows.json", 24)
    write_alpaca(tmp_path / "other.json", 6)
    return {
        "model": {"path": str(model)},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 4},
        "optim": {"type": "adamw", "lr": 0.02},
        "train": {"rows_per_device": 4, "epochs": 2, "log_every": 1, "output": str(tmp_path / "run")},
    }


def changed(recipe: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return {name: {**value, **sections.pop(name, {})} for name, value in recipe.items()} | sections


def log_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]


def nll(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Mean negative log-likelihood of the answers by plain transformers, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        messages = [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
        ]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]  # up to the last stop token
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        answer = torch.tensor(ids[len(prompt) :])
        total -= float(logprobs[len(prompt) - 1 : -1].gather(-1, answer[:, None]).sum())
        count += len(answer)
    return total / count


def test_lora_run_learns_and_its_folder_loads_with_peft(
    recipe: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    result = luthier.train(changed(recipe, data={"eval": ["other.json"]}), quiet=True)
    run = result.output
    lines = [line for line in log_lines(run) if "loss" in line]
    assert [line["current_steps"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert lines[-1]["percentage"] == 100.0
    tokenizer = AutoTokenizer.from_pretrained(run)
    base = AutoModelForCausalLM.from_pretrained(model)
    rows = json.loads((tmp_path / "other.json").read_text())
    expected = nll(PeftModel.from_pretrained(base, str(run)).eval(), tokenizer, rows)
    assert result.metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert result.metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "run.json",
        "recipe.yaml", "train_results.json", "eval_results.json", "all_results.json", "trainer_state.json",
        "trainer_log.jsonl", "training_loss.png", "checkpoint-6", "checkpoint-12",
    }  # fmt: skip
    assert json.loads((run / "all_results.json").read_text())["eval_loss"] == result.metrics["eval_loss"]
    tokens = sum(line.get("tokens", 0) for line in lines[-1:])
    assert tokens == json.loads((run / "train_results.json").read_text())["train_tokens"]
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["parameters"]["trainable"] == sum(
        tensor.numel() for tensor in load_file(run / "adapter_model.safetensors").values()
    )


def test_full_run_saves_a_model_and_loads_the_best(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A learning rate that ruins the model late, so that the best checkpoint is not the last."""
    result = luthier.train(
        changed(
            recipe,
            data={"dev_split": 6},
            train={"eval_every": 1, "save_every": 1, "load_best": True, "save_total_limit": 2, "epochs": 3},
        )
        | {"method": {"type": "full"}, "optim": {"type": "adamw", "lr": 0.3, "schedule": "constant"}},
        quiet=True,
    )
    run = result.output
    evaluations = {line["current_steps"]: line["eval_loss"] for line in log_lines(run) if "eval_loss" in line}
    best = min(evaluations, key=lambda step: evaluations[step])
    last = max(evaluations)
    assert best != last, "the case must have its best before its end"
    assert result.metrics["eval_loss"] == pytest.approx(evaluations[best], rel=1e-6)
    kept = {path.name for path in run.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", f"checkpoint-{last}"}
    final, chosen = (load_file(folder / "model.safetensors") for folder in (run, run / f"checkpoint-{best}"))
    assert all(torch.equal(final[name], chosen[name]) for name in chosen)
    config = json.loads((run / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_several_eval_sets_pool_by_tokens(recipe: dict[str, Any], tmp_path: Path) -> None:
    write_alpaca(tmp_path / "third.json", 11)
    result = luthier.train(
        changed(recipe, data={"eval": ["other.json", "third.json"]}, train={"eval_only": True}), quiet=True
    )
    numbers = result.metrics
    pooled = []
    for name in ("other", "third"):
        alone = luthier.train(
            changed(
                recipe,
                data={"eval": [f"{name}.json"]},
                train={"eval_only": True, "output": str(tmp_path / name)},
            ),
            quiet=True,
        ).metrics["eval_loss"]
        assert numbers[f"eval_{name}_loss"] == pytest.approx(alone, rel=1e-6)
        pooled.append(alone)
    assert min(pooled) < numbers["eval_loss"] < max(pooled)
    assert not list((tmp_path / "run").glob("adapter*"))


def test_stacked_adapters_continue_where_the_run_ended(
    recipe: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    first = luthier.train(changed(recipe, data={"eval": ["other.json"]}), quiet=True)
    continued = changed(
        recipe,
        data={"eval": ["other.json"]},
        method={"adapters": [str(first.output)]},
        train={"eval_only": True, "output": str(tmp_path / "second")},
    )
    second = luthier.train(continued, quiet=True)
    assert second.metrics["eval_loss"] == pytest.approx(first.metrics["eval_loss"], rel=1e-5)
    stacked = luthier.train(
        continued, ["method.create_new_adapter=true", f"train.output={tmp_path / 'third'}"], quiet=True
    )
    assert stacked.metrics["eval_loss"] == pytest.approx(first.metrics["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_pretraining_on_text(packing: bool, recipe: dict[str, Any], tmp_path: Path) -> None:
    lines = [f"line {n}: " + "the cat sat on the mat. " * (n % 4 + 1) for n in range(30)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    result = luthier.train(
        changed(recipe, data={"train": ["text.txt"], "max_length": 64, "packing": packing})
        | {"stage": {"type": "pt"}},
        quiet=True,
    )
    losses = [line["loss"] for line in log_lines(result.output) if "loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    (report,) = json.loads((result.output / "run.json").read_text())["reports"]
    # byte tokens: every byte and one end token a line; each window after a line's first repeats one token
    text_tokens = sum(len(line.encode()) + 1 for line in lines)
    assert report["targets"] == text_tokens - len(lines)
    assert report["lost_rows"] == 0


def test_existing_run_is_not_touched(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = luthier.train(recipe, ["train.max_steps=1"], quiet=True).output
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(CheckpointError, match="holds a run already"):
        luthier.train(recipe, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    luthier.train(recipe, ["train.max_steps=2", "train.overwrite=true"], quiet=True)
    assert max(line["current_steps"] for line in log_lines(run)) == 2


def test_bad_data_leaves_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": "c"}]')
    with pytest.raises(DataError):
        luthier.train(recipe, quiet=True)
    assert not (tmp_path / "run").exists()
