"""Whole runs of models that need padded rows: trained, evaluated, saved and resumed like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import luthier
from luthier.types import ModelError
from tests.padded import padded_chat_model
from tests.tiny import chat_model, write_alpaca

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4, "dropout": 0.1, "targets": ["in_proj", "x_proj"]},
    "full": {"type": "full"},
    "freeze": {"type": "freeze", "layers": 1, "extra_modules": ["embeddings"]},
}


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return padded_chat_model(tmp_path_factory.mktemp("mamba"), "mamba")


def recipe(model: Path, folder: Path, method: dict[str, Any], **train: Any) -> dict[str, Any]:
    write_alpaca(folder / "rows.json", 20)
    return {
        "model": {"path": str(model)},
        "data": {
            "train": ["rows.json"],
            "directory": str(folder),
            "cache": str(folder / "cache"),
            "dev_split": 4,
        },
        "method": method,
        "optim": {"type": "adamw", "lr": 1e-2},
        "train": {
            "tokens_per_batch": 200,
            "tokens_per_pass": 120,
            "epochs": 2,
            "output": str(folder / "straight"),
            "log_every": 1,
            "save_every": 1,
            "plots": False,
            **train,
        },
    }


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = run.glob("*.safetensors")
    return load_file(file)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return {line["current_steps"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_bitwise(method: str, mamba: Path, tmp_path: Path) -> None:
    base = recipe(mamba, tmp_path, METHODS[method])
    straight = luthier.train(base, quiet=True).output
    expected, expected_losses = weights(straight), losses(straight)
    checkpoints = sorted(straight.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) == len(expected_losses) >= 4
    for checkpoint in (checkpoints[0], checkpoints[-2]):
        resumed = tmp_path / f"from-{checkpoint.name}"
        resumed.mkdir()
        for name in ("recipe.yaml", "trainer_log.jsonl"):
            shutil.copy(straight / name, resumed / name)
        shutil.copytree(checkpoint, resumed / checkpoint.name)
        luthier.train(base, [f"train.output={resumed}", "train.resume=auto"], quiet=True)
        assert losses(resumed) == expected_losses
        for name, tensor in weights(resumed).items():
            assert torch.equal(tensor, expected[name]), (checkpoint.name, name)


@pytest.mark.parametrize(
    ("family", "side"), [("mamba", "right"), ("mamba", "left"), ("bamba", "left"), ("bloom", "right")]
)
def test_passes_change_nothing(family: str, side: str, tmp_path: Path) -> None:
    """Few rows at a time, many, or one: the same losses; only real tokens are counted."""
    model = padded_chat_model(tmp_path / "model", family)
    base = recipe(model, tmp_path, {"type": "full"}, save_every=None, epochs=1)
    found = {}
    for tokens_per_pass in (1, 120, 4096):
        output = tmp_path / str(tokens_per_pass)
        overrides = [
            f"train.tokens_per_pass={tokens_per_pass}",
            f"train.output={output}",
            f"model.padding_side={side}",
        ]
        result = luthier.train(base, overrides, quiet=True)
        rows = json.loads((output / "run.json").read_text())["rows"]
        assert (rows["layout"], rows["padding_side"]) == ("padded", side)
        assert rows["self_test"]["padded"]["difference"] < 1e-4
        if tokens_per_pass == 1:
            assert rows["padding_share"] == 0.0
        else:
            assert 0 < rows["padding_share"] < 0.5
        found[tokens_per_pass] = (
            [*losses(output).values(), result.metrics["eval_loss"]],
            result.metrics["train_tokens"],
        )
    alone, tokens = found[1]
    reports = json.loads((tmp_path / "1" / "run.json").read_text())["reports"]
    assert tokens < sum(report["tokens"] for report in reports)  # four rows were kept for the evaluation
    for numbers, counted in found.values():
        assert numbers == pytest.approx(alone, rel=1e-5)
        assert counted == tokens


def test_saved_adapter_has_the_loss_that_was_reported(mamba: Path, tmp_path: Path) -> None:
    """By plain transformers and PEFT, each row alone."""
    from tests.training import CPU

    base = recipe(mamba, tmp_path, METHODS["lora"], save_every=None)
    result = luthier.train(base, quiet=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(mamba), result.output)
    model.eval()

    from luthier.material import load_tokens, read_material
    from luthier.model.load import locate
    from luthier.recipe.load import load_recipe
    from luthier.recipe.resolve import resolve

    settings = resolve(load_recipe(base), CPU).recipe
    tokenizer, _ = load_tokens(settings, locate(settings.model), lambda text: None)
    (table,) = read_material(settings, tokenizer, lambda text: None).data.eval.values()
    total = weight = 0.0
    with torch.no_grad():
        for sample in table[:]:
            ids = torch.tensor(sample.input_ids.tolist())[None]
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            learnt = torch.tensor(sample.weights[1:].tolist())
            total, weight = total - float((logprobs * learnt).sum()), weight + float(learnt.sum())
    assert result.metrics["eval_loss"] == pytest.approx(total / weight, rel=1e-5)


def test_forced_padding_equals_flat(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model")
    base = recipe(model, tmp_path, {"type": "full"}, save_every=None)
    numbers = {}
    for rows in ("flat", "padded"):
        result = luthier.train(base, [f"model.rows={rows}", f"train.output={tmp_path / rows}"], quiet=True)
        assert json.loads((tmp_path / rows / "run.json").read_text())["rows"]["layout"] == rows
        numbers[rows] = [*losses(result.output).values(), result.metrics["eval_loss"]]
    assert numbers["padded"] == pytest.approx(numbers["flat"], rel=1e-5)


def test_forced_flat_rows_are_refused(mamba: Path, tmp_path: Path) -> None:
    base = recipe(mamba, tmp_path, METHODS["lora"])
    with pytest.raises(ModelError, match=r"MambaForCausalLM never calls.*model\.rows=flat is not exact here"):
        luthier.train(base, ["model.rows=flat"], quiet=True)
    assert not (tmp_path / "straight").exists()


def test_the_reason_is_said(mamba: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    luthier.train(recipe(mamba, tmp_path, METHODS["lora"], max_steps=1, save_every=None))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "rows are padded" in line]
    assert line.startswith("note: rows are padded on the right (")
    assert "of all positions is padding): MambaForCausalLM never calls the attention function" in line
