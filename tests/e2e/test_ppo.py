"""Runs of ppo from a recipe, with each kind of critic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from tests.online import logged, online_recipe

PPO = {"type": "ppo", "epochs": 2, "minibatches": 2, "prompts_per_rollout": 4}


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in logged(run) if "loss" in line]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("critic", ["shared", "own"])
def test_a_critic_of_each_kind_learns_what_to_expect(critic: str, method: str, tmp_path: Path) -> None:
    """The reward is the same for every answer, so its value can be learnt; nothing else of the run can."""
    base = online_recipe(tmp_path, {**PPO, "critic": critic, "value_weight": 1.0}, num_rows=8)
    base["stage"] |= {"kl": {"coefficient": 0.0}, "whiten_advantages": False}
    base["stage"]["rewards"] = [{"type": "function", "path": f"{tmp_path / 'reward.py'}:same"}]
    base["method"] = {"type": method, **({"rank": 4} if method == "lora" else {})}
    base["data"]["dev_split"] = 2
    base["train"] |= {"epochs": 6, "save_every": "epoch"}
    run = luthier.train(base, quiet=True).output
    lines = steps(run)
    assert len(lines) == 6 * 2 * 4  # 6 prompts are a rollout of 4 and one of 2
    assert all(line["loss"] != "NaN" for line in lines)
    values = [line["value/mean"] for line in lines if "value/mean" in line]
    assert values[0] == 0.0  # the head begins as zeros
    assert abs(values[-1] - 1.0) < abs(values[0] - 1.0) / 2
    assert {line["reward"] for line in lines if "reward" in line} == {1.0}
    assert any(line.get("eval_reward") == 1.0 for line in logged(run))
    saved = {path.name for path in (run / "checkpoint-48").rglob("*.safetensors")}
    assert "value_head.safetensors" in saved
    assert (run / "value_head.safetensors").exists() == (critic == "shared")


def test_the_reference_holds_the_policy(tmp_path: Path) -> None:
    """The divergence per answer is logged, 0 before the first step, and the coefficient adapts to it."""
    kl = {"coefficient": 0.2, "target": 0.5, "horizon": 40}
    base = online_recipe(tmp_path, {**PPO, "kl": kl}, num_rows=8)
    base["train"]["epochs"] = 2
    run = luthier.train(base, quiet=True).output
    rollouts = [line for line in steps(run) if "kl/answer" in line]
    assert len(rollouts) == 4
    assert rollouts[0]["kl/answer"] == pytest.approx(0.0, abs=1e-5)
    assert rollouts[1]["kl/answer"] != 0
    assert rollouts[0]["kl/coefficient"] == 0.2
    # Ziegler et al.: less divergence than wanted lowers the coefficient by 1 - 0.2 answers / horizon.
    assert rollouts[1]["kl/coefficient"] == pytest.approx(0.2 * (1 - 0.2 * 4 / 40))


def test_ppo_moves_what_trains(tmp_path: Path) -> None:
    base = online_recipe(tmp_path, PPO, num_rows=8)
    run = luthier.train(base, quiet=True).output
    trained = load_file(run / "adapter_model.safetensors")
    lora_b = [tensor for name, tensor in trained.items() if "lora_B" in name]
    assert lora_b
    assert all(bool(tensor.any()) for tensor in lora_b)
    assert not any("critic" in name for name in trained)
    assert float(load_file(run / "value_head.safetensors")["v_head.summary.weight"].abs().max()) > 0
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_first_ratio_is_one_whatever_the_models_dropout(stage: str, tmp_path: Path) -> None:
    """Answers are drawn, and asked about, without dropout: what learns from them has none either."""
    chosen = PPO if stage == "ppo" else {"type": "grpo", "group_size": 4, "minibatches": 2}
    base = online_recipe(tmp_path, chosen, num_rows=8, attention_dropout=0.5)
    lines = steps(luthier.train(base, quiet=True).output)
    first = [line for line in lines if "reward" in line]
    assert first
    assert all(line["approx_kl"] == pytest.approx(0, abs=1e-6) for line in first)
    assert all(line["ratio/max"] == pytest.approx(1, abs=1e-4) for line in first)
