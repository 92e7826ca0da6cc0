"""A run of ppo or grpo that was resumed is the uninterrupted one, bit by bit: from every step, in the middle of a
rollout's updates, too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.trainer.checkpoint import verify
from luthier.trainer.saving import EXPERIENCE_NAME
from luthier.types import CheckpointError
from tests.online import logged, online_recipe

STAGES: dict[str, dict[str, Any]] = {
    "grpo": {
        "type": "grpo",
        "group_size": 3,
        "epochs": 2,
        "minibatches": 2,
        "kl": {"coefficient": 0.1, "target": 1.0, "horizon": 50},
        "importance_cap": 2.0,
        "dynamic_sampling": 1,
    },
    "ppo": {"type": "ppo", "epochs": 2, "minibatches": 2, "score_norm": True},
}


def files(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}:{name}": tensor
        for file in run.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("stage", STAGES)
def test_resume_at_every_step_is_bitwise(stage: str, tmp_path: Path) -> None:
    base = online_recipe(tmp_path, STAGES[stage], num_rows=6)
    base["data"]["dev_split"] = 2
    # An epoch is a rollout of 3 prompts and one of 1, with 4 updates each; the run ends inside the second epoch.
    base["train"] |= {"max_steps": 10, "save_every": 1, "eval_every": 4}
    straight = luthier.train(base, quiet=True).output
    expected, log, samples = files(straight), logged(straight), logged(straight, "samples.jsonl")
    checkpoints = sorted(straight.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    under_way = [(checkpoint / EXPERIENCE_NAME).exists() for checkpoint in checkpoints]
    assert under_way == [True, True, True, False] * 2 + [True, True]
    for checkpoint in checkpoints[:-1]:
        resumed = tmp_path / f"from-{checkpoint.name}"
        resumed.mkdir()
        for name in ("recipe.yaml", "trainer_log.jsonl", "samples.jsonl"):
            shutil.copy(straight / name, resumed / name)
        shutil.copytree(checkpoint, resumed / checkpoint.name)
        luthier.train(base, [f"train.output={resumed}", "train.resume=auto"], quiet=True)
        assert logged(resumed) == log, checkpoint.name
        assert logged(resumed, "samples.jsonl") == samples, checkpoint.name
        found = files(resumed)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), (checkpoint.name, name)
        shutil.rmtree(resumed)
    moved = [line["grad_norm"] for line in log if "loss" in line]
    assert len(set(moved)) >= 8  # it was no run that stands still


def test_experience_is_in_the_manifest(tmp_path: Path) -> None:
    """A damaged one is found like any other file of a checkpoint."""
    base = online_recipe(tmp_path, STAGES["grpo"], num_rows=3)
    base["train"] |= {"save_every": 1, "max_steps": 2}
    run = luthier.train(base, quiet=True).output
    file = run / "checkpoint-1" / EXPERIENCE_NAME
    verify(run / "checkpoint-1")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=EXPERIENCE_NAME):
        verify(run / "checkpoint-1")
