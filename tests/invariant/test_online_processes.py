"""Two processes that share a run of ppo or grpo are one process: answers, rewards, statistics, weights, files.

All runs in two processes are made once, in one pair of them; the other half of each comparison runs here.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.trainer.checkpoint import verify
from tests import processes
from tests.online import logged, online_recipe

pytestmark = pytest.mark.slow

STAGES: dict[str, dict[str, Any]] = {
    # Whole statistics: advantages over the rollout, an adapted coefficient, groups replaced for all processes.
    "grpo": {
        "type": "grpo",
        "group_size": 3,
        "advantage": "batch",
        "kl": {"coefficient": 0.1, "target": 1.0, "horizon": 50},
        "importance_cap": 2.0,
        "dynamic_sampling": 1,
    },
    "ppo": {"type": "ppo", "score_norm": True, "whiten_rewards": True},
    "ppo-stopped": {"type": "ppo", "critic": "own", "target_kl": 1e-3},
}
STEPS = 8
PROMPTS = 7
"""Of an epoch: a rollout of 5, whose minibatches are 3 and 2, and one of 2, whose minibatches are 1 prompt, so that one
process has nothing to do (ppo), or the group is taken apart (grpo)."""
REWARDED = ("reward", "completion/", "eval_reward", "eval_completion/", "group/", "groups_replaced")
UNLIKE = ("tokens", "total_flos")
"""Prompts that are computed once for a group are computed twice where it is shared out, and idle passes count."""


def recipe(folder: Path, name: str) -> dict[str, Any]:
    common = {"epochs": 2, "minibatches": 2, "prompts_per_rollout": 5, "max_samples": 99}
    base = online_recipe(folder / name, {**common, **STAGES[name]}, num_rows=PROMPTS + 3)
    base["data"]["dev_split"] = 3
    base["train"] |= {"max_steps": STEPS, "eval_every": 4, "save_every": 3}
    # Where a weight rests on rounding alone, Adam would make a whole step of it; see `assert_same_weights`.
    base["optim"] = {"type": "sgd", "lr": 0.05, "schedule": "constant"}
    base["method"] = {"type": "full"}
    if name == "grpo":  # half of the prompts have groups of equal rewards
        path = base["stage"]["rewards"][0]["path"]
        base["stage"]["rewards"] = [{"type": "function", "path": path.replace(":low", ":low_or_same")}]
    return base


def written_to(base: Mapping[str, Any], output: Path, **train: Any) -> dict[str, Any]:
    found = copy.deepcopy(dict(base))
    found["train"] |= {"output": str(output), **train}
    return found


def goes_on(base: Mapping[str, Any], checkpoint: Path, output: Path) -> dict[str, Any]:
    """The recipe in a run directory that has been left after this checkpoint."""
    output.mkdir(parents=True)
    for name in ("recipe.yaml", "trainer_log.jsonl", "samples.jsonl"):
        shutil.copy(checkpoint.parent / name, output / name)
    shutil.copytree(checkpoint, output / checkpoint.name)
    return written_to(base, output, resume="auto")


@dataclass
class Runs:
    """One process's run of each stage, and where each run in two processes is."""

    one: dict[str, Path]
    two: dict[str, Path]
    recipes: dict[str, dict[str, Any]]
    said: dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("processes")
    recipes = {name: recipe(folder, name) for name in STAGES}
    one = {name: luthier.train(base, quiet=True).output for name, base in recipes.items()}
    made: dict[str, tuple[dict[str, Any], processes.Change | None]] = {}

    def add(label: str, base: Mapping[str, Any], change: processes.Change | None = None) -> None:
        made[label] = (written_to(base, folder / "two" / label), change)

    for name, base in recipes.items():
        add(name, base)
    grpo, ppo = recipes["grpo"], recipes["ppo"]
    made["from one"] = (goes_on(grpo, one["grpo"] / "checkpoint-3", folder / "two" / "from one"), None)
    add("stopped", ppo, processes.signal_in_third_update)
    made["resumed"] = (written_to(ppo, folder / "two" / "stopped", resume="auto"), None)
    add("interrupted", ppo, processes.signal_in_second_rollout)
    add("local whitening", ppo, processes.local_whitening)
    add("local weights", grpo, processes.local_weights)
    add("own seeds", grpo, processes.own_seeds)
    failing = copy.deepcopy(ppo)
    failing["stage"]["rewards"][0]["path"] = failing["stage"]["rewards"][0]["path"].replace(":low", ":broken")
    add("failing", failing)
    said = processes.train_in_processes(list(made.values()), folder / "said")
    two = {label: Path(run["train"]["output"]) for label, (run, _) in made.items()}
    return Runs(one, two, recipes, dict(zip(made, zip(*said, strict=True), strict=True)))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(run.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def furthest(found: Path, expected: Path, start: Path) -> float:
    """How far weights of two runs are apart: 1 is 1e-6 of the largest movement, and two roundings of the weight.

    Sums over tokens are the same but for their order, which is a relative error of some float32 roundings (6e-8)
    in each gradient. A weight near 1 moves by 1e-2 in steps that are rounded when they are stored.
    """
    one, two, before = weights(found), weights(expected), weights(start)
    assert one.keys() == two.keys()
    moved = max(float((two[name] - before.get(name, torch.zeros(()))).abs().max()) for name in two)
    assert moved > 1e-3
    apart = [(one[name] - two[name]).abs() / (1e-6 * moved + 2**-22 * two[name].abs()) for name in two]
    return max(float(ratio.max()) for ratio in apart)


def assert_same_log(found: Path, expected: Path) -> None:
    """Rewards and answers to the last bit; what is computed from log-probabilities to rounding."""
    lines, wanted = logged(found), logged(expected)
    assert len(lines) == len(wanted) >= STEPS
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if name in UNLIKE:
                continue
            if name.startswith(REWARDED) or not isinstance(value, float):
                assert line[name] == value, (name, other["current_steps"])
            else:
                assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, other["current_steps"])


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(stage: str, runs: Runs) -> None:
    one, two = runs.one[stage], runs.two[stage]
    assert runs.said[stage] == ("", "")
    # Every answer of every rollout, with its rewards: written by one process, sampled by both.
    assert logged(two, "samples.jsonl") == logged(one, "samples.jsonl")
    assert_same_log(two, one)
    assert furthest(two, one, Path(runs.recipes[stage]["model"]["path"])) < 1
    states = [path for path in (one, two) if (path / "checkpoint-3" / "rng_state.pth").exists()]
    assert states == [one]


def test_what_was_compared_is_what_was_meant(runs: Runs) -> None:
    """Groups were replaced, evaluations made, updates left out; rewards differ."""
    lines = {name: logged(run) for name, run in runs.two.items() if name in STAGES}
    assert any(line.get("groups_replaced", 0) > 0 for line in lines["grpo"])
    assert [line["current_steps"] for line in lines["ppo"] if "eval_reward" in line] == [4, 8]
    left_out = [line["updates_left_out"] for line in lines["ppo-stopped"] if "updates_left_out" in line]
    assert 0.0 in left_out and 1.0 in left_out
    rewards = [line["reward"] for line in lines["ppo"] if "reward" in line]
    assert len(rewards) == len(set(rewards)) == 2
    coefficients = [line["kl/coefficient"] for line in lines["grpo"] if "kl/coefficient" in line]
    assert coefficients[0] != coefficients[1]


# ---- checkpoints -------------------------------------------------------------------------------------------


def test_a_checkpoint_of_one_process_goes_on_in_two(runs: Runs) -> None:
    """From the middle of a rollout's updates."""
    assert runs.said["from one"] == ("", "")
    assert_same_log(runs.two["from one"], runs.one["grpo"])
    assert furthest(runs.two["from one"], runs.one["grpo"], Path(runs.recipes["grpo"]["model"]["path"])) < 1


def test_a_checkpoint_of_two_processes_goes_on_in_one(runs: Runs, tmp_path: Path) -> None:
    checkpoint = runs.two["grpo"] / "checkpoint-3"
    verify(checkpoint)
    luthier.train(goes_on(runs.recipes["grpo"], checkpoint, tmp_path / "run"), quiet=True)
    assert_same_log(tmp_path / "run", runs.one["grpo"])
    assert furthest(tmp_path / "run", runs.one["grpo"], Path(runs.recipes["grpo"]["model"]["path"])) < 1


def test_a_signal_to_one_process_stops_both_and_they_go_on_bitwise(runs: Runs) -> None:
    """In the middle of a rollout's updates."""
    first, second = runs.said["stopped"]
    assert first == second
    assert first.startswith("RunInterrupted: SIGTERM: stopped after step 3 of 8")
    assert runs.said["resumed"] == ("", "")
    resumed, straight = runs.two["resumed"], runs.two["ppo"]
    found, expected = weights(resumed), weights(straight)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The interrupted run wrote a line of its end.
    ends = [number for number, line in enumerate(logged(resumed)) if "train_loss" in line]
    assert [logged(resumed)[number]["current_steps"] for number in ends] == [3, STEPS]
    assert [line for number, line in enumerate(logged(resumed)) if number != ends[0]] == logged(straight)
    assert logged(resumed, "samples.jsonl") == logged(straight, "samples.jsonl")


def test_a_signal_while_one_process_samples_ends_the_rollout_of_both(runs: Runs) -> None:
    """Step 5 would have been the first of the second rollout, and nothing of it is left."""
    first, second = runs.said["interrupted"]
    assert first == second
    assert first.startswith("RunInterrupted: SIGTERM: stopped after step 4 of 8")
    verify(runs.two["interrupted"] / "checkpoint-4")
    assert {line["rollout"] for line in logged(runs.two["interrupted"], "samples.jsonl")} == {0}


# ---- faults ------------------------------------------------------------------------------------------------


def test_a_reward_that_fails_in_one_process_ends_both(runs: Runs) -> None:
    said = sorted(runs.said["failing"], key=len)
    assert all(text.startswith("RewardError: ") for text in said)
    assert "row 3" in said[0]
    assert "process " in said[1] and said[0].removeprefix("RewardError: ") in said[1]


@pytest.mark.parametrize(("fault", "stage"), [("local whitening", "ppo"), ("local weights", "grpo")])
def test_a_planted_fault_is_seen(fault: str, stage: str, runs: Runs) -> None:
    """Statistics of one process's part: far outside of what rounding explains."""
    assert runs.said[fault] == ("", "")
    start = Path(runs.recipes[stage]["model"]["path"])
    assert furthest(runs.two[fault], runs.one[stage], start) > 1000


def test_other_seeds_are_seen(runs: Runs) -> None:
    def texts(run: Path) -> list[str]:
        return [json.dumps(line) for line in logged(run, "samples.jsonl") if line["rollout"] == 0]

    found, expected = texts(runs.two["own seeds"]), texts(runs.one["grpo"])
    assert 0 < len(set(expected) - set(found)) < len(expected)  # those of the second process alone
