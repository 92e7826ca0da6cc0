"""A reward model is trained on pairs, then drives ppo: as adapter on the policy's own base, and as a model of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from tests.online import logged
from tests.reward import reward_recipe, write_pairs
from tests.tiny import chat_model

KINDS = ("lora", "full")
"""Of the reward model; the policy trains an adapter beside either."""
ROLLOUTS = 12
PROMPTS = 36
POLICY = {"type": "lora", "rank": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that counts or refuses, one as likely as the other, prompts for it, and in `rm-lora` and `rm-full` a reward
    model of each kind that likes counting better."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("home")
    pairs = write_pairs(folder / "pairs.json")
    rows = [
        {"instruction": row["instruction"], "output": row[side]}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    (folder / "both.json").write_text(json.dumps(rows), encoding="utf-8")
    chat_model(folder / "untaught")
    base = {
        "model": {"path": str(folder / "untaught")},
        "data": {
            "train": [{"file_name": str(folder / "both.json")}],
            "max_length": 128,
            "cache": str(folder / "cache"),
        },
        "method": {"type": "full"},
        "optim": {"lr": 1e-2},
        "train": {
            "output": str(folder / "base"),
            "rows_per_device": 16,
            "max_steps": 60,
            "save_every": None,
            "plots": False,
        },
    }
    luthier.train(base, quiet=True)
    for kind in KINDS:
        method = {"type": "lora", "rank": 4} if kind == "lora" else {"type": "full"}
        recipe = reward_recipe(folder, method, output=str(folder / f"rm-{kind}"), max_steps=12)
        metrics = luthier.train(recipe, quiet=True).metrics
        assert metrics["eval_accuracy"] > 0.5
    rows = [{"instruction": f"Count to {n}."} for n in range(2, 2 + PROMPTS)]
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")
    info = {"prompts": {"file_name": "prompts.json"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def ppo_recipe(home: Path, kind: str, output: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(home / "base")},
        "data": {"train": ["prompts"], "directory": str(home), "cache": str(home / "cache")},
        "stage": {
            "type": "ppo",
            "prompts_per_rollout": PROMPTS,
            "epochs": 2,
            "rewards": [{"type": "model", "path": str(home / f"rm-{kind}")}],
            "value_start": str(home / f"rm-{kind}") if kind == "lora" else None,
            "kl": {"coefficient": 0.0},
            "samples_every": 1,
            "max_samples": PROMPTS,
        },
        "method": POLICY,
        "optim": {"lr": 5e-3, "schedule": "constant"},
        "generation": {"max_new_tokens": 8, "rows": PROMPTS, "memory_gib": 0.1},
        "train": {
            "output": str(output),
            "max_steps": 2 * ROLLOUTS,
            "save_every": ROLLOUTS,
            "log_every": 1,
            "plots": False,
        },
    }


def sampled(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def scored(model: Path, asked: list[tuple[str, str]], folder: Path) -> list[float]:
    """What `luthier score` says of answers to prompts."""
    folder.mkdir(exist_ok=True)
    rows = [{"instruction": prompt, "output": answer} for prompt, answer in asked]
    (folder / "asked.json").write_text(json.dumps(rows), encoding="utf-8")
    words = ["score", str(model), str(folder / "asked.json"), "--output", str(folder / "scores.jsonl")]
    result = CliRunner().invoke(app, [*words, "--overwrite"])
    assert result.exit_code == 0, result.output
    lines = (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["score"] for line in lines]


def require_scores(home: Path, kind: str, run: Path, folder: Path) -> int:
    """Every reward of the table is the reward model's own score; how many were compared."""
    prompts = [row["instruction"] for row in json.loads((home / "prompts.json").read_text(encoding="utf-8"))]
    entries = [entry for entry in sampled(run) if entry["completion"].strip()]
    wanted = scored(
        home / f"rm-{kind}", [(prompts[entry["row"]], entry["completion"]) for entry in entries], folder
    )
    rewards = [entry["rewards"]["model"] for entry in entries]
    np.testing.assert_allclose(rewards, wanted, atol=1e-4, rtol=0)
    assert [entry["reward"] for entry in entries] == rewards
    assert float(np.std(wanted)) > 0.01  # else any answer's score would do
    return len(entries)


@pytest.mark.parametrize("kind", KINDS)
def test_it_drives_ppo(kind: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(ppo_recipe(home, kind, tmp_path / "run")))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    shares = f"{home / 'rm-lora'} shares the policy's base" in result.output.replace("\n", "")
    assert shares == (kind == "lora")
    run = tmp_path / "run"

    assert require_scores(home, kind, run, tmp_path / "asked") > ROLLOUTS * PROMPTS / 2
    lines = [line for line in logged(run) if "reward" in line]
    assert len(lines) == ROLLOUTS
    table = np.array([entry["reward"] for entry in sampled(run)]).reshape(ROLLOUTS, PROMPTS)
    np.testing.assert_allclose([line["reward"] for line in lines], table.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose([line["reward/model"] for line in lines], table.mean(axis=1), atol=1e-5)

    # Better at the end than at the beginning, by more than chance has between rollouts.
    first, last = table[:2].ravel(), table[-4:].ravel()
    error = float(np.sqrt(first.var() / len(first) + last.var() / len(last)))
    assert last.mean() - first.mean() > 4 * error, (first.mean(), last.mean(), error)

    for folder in (run, run / f"checkpoint-{ROLLOUTS}", run / f"checkpoint-{2 * ROLLOUTS}"):
        require_policy_alone(folder)


def require_policy_alone(folder: Path) -> None:
    """The folder of an adapter has the policy's, and of the reward model nothing."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["task_type"], config["r"], config["modules_to_save"]) == ("CAUSAL_LM", 3, None)
    weights = load_file(folder / "adapter_model.safetensors")
    assert {min(weight.shape) for weight in weights.values()} == {3}  # the reward model's rank is 4
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in weights)
    assert [path.name for path in folder.rglob("adapter_config.json") if path.parent == folder] == [
        "adapter_config.json"
    ]
    below = {
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("checkpoint-")
    }
    assert not any((folder / name / "adapter_model.safetensors").exists() for name in below)
    assert not [path for path in folder.iterdir() if "reward" in path.name]
    # What ppo has beside the policy is its critic's head, which is not the reward model's.
    assert set(load_file(folder / "value_head.safetensors")) == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_llamafactory_file_does_so_too(kind: str, home: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "model_name_or_path": str(home / "base"),
        "reward_model": str(home / f"rm-{kind}"),
        "reward_model_type": kind,
        "stage": "ppo",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 3,
        "lora_target": "all",
        "ppo_buffer_size": 2,
        "ppo_epochs": 2,
        "dataset": "prompts",
        "dataset_dir": str(home),
        "template": "qwen",
        "cutoff_len": 200,
        "max_new_tokens": 8,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 2.0,
        "logging_steps": 1,
        "output_dir": str(tmp_path / "run"),
        "report_to": "none",
    }
    file = tmp_path / "theirs.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()), encoding="utf-8")
    result = CliRunner().invoke(app, ["train", str(file)])
    assert result.exit_code == 0, result.output
    run = tmp_path / "run"
    # 36 prompts are three rollouts of 3 x 2 x 2, twice; the table has the first eight answers of the first one.
    table = sampled(run)
    assert len(table) == 8 and {entry["rollout"] for entry in table} == {0}
    assert sum("reward/model" in line for line in logged(run)) == 6
    assert require_scores(home, kind, run, tmp_path / "asked") > 4
    moved = [
        weight for name, weight in load_file(run / "adapter_model.safetensors").items() if "lora_B" in name
    ]
    assert moved and all(bool(weight.any()) for weight in moved)
    require_policy_alone(run)
