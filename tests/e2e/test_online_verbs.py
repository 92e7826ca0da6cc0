"""Every other verb with recipes and runs of ppo and grpo: what is said before a run, and what a run is afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import luthier
from luthier.check.check import check
from luthier.check.page import page
from luthier.check.text import sample_text
from luthier.cli import app
from luthier.run import prepare
from luthier.selfcheck.verb import CHECKS, selfcheck
from luthier.types import LuthierError
from tests.online import online_recipe

GRPO: dict[str, Any] = {"type": "grpo", "group_size": 3}
PPO: dict[str, Any] = {"type": "ppo", "epochs": 2}


# --------------------------------------------------------------------------------------------------
# check


@pytest.mark.parametrize(("stage", "updates", "answers"), [(GRPO, 1, 3), (PPO, 2, 1)], ids=["grpo", "ppo"])
def test_check_plans_rollouts_at_their_longest(
    stage: dict[str, Any], updates: int, answers: int, tmp_path: Path
) -> None:
    recipe = online_recipe(tmp_path, stage)
    found = check(recipe)
    assert found.ok, found.problems
    schedule, memory = found.schedule, found.memory
    assert schedule is not None and memory is not None and found.probe is None
    # 11 prompts are 4 rollouts of at most 3.
    assert (schedule.steps_per_epoch, schedule.steps) == (4 * updates, 4 * updates)
    lengths = sorted(int(edge) for dataset in found.datasets for edge in dataset.histogram.edges)
    assert schedule.most_tokens <= 3 * (lengths[-1] + answers * 8)
    assert schedule.tokens_per_step == pytest.approx(schedule.tokens_per_epoch / (4 * updates), abs=1)
    assert "sampling" in memory.moments
    assert any(note.startswith("answers are taken to have 8 tokens") for note in found.notes)
    assert [sample.learnt for sample in found.samples] == [0, 0, 0]
    for written in (page(found, "check"), sample_text(found.samples[0])):
        assert f"a prompt of {len(found.samples[0].tokens)} tokens" in written
        assert "are learnt" not in written
    assert not (tmp_path / "run").exists()


def test_longer_answers_take_more_of_everything(tmp_path: Path) -> None:
    recipe = online_recipe(tmp_path, GRPO)
    short, long = (
        check(recipe, [f"generation.max_new_tokens={tokens}", "train.tokens_per_pass=64"])
        for tokens in (4, 40)
    )
    assert short.schedule is not None and long.schedule is not None
    assert short.memory is not None and long.memory is not None
    assert long.schedule.most_tokens - short.schedule.most_tokens == 3 * 3 * 36
    assert long.schedule.passes_per_step > short.schedule.passes_per_step
    assert long.memory.moments["sampling"] > short.memory.moments["sampling"]


def test_check_says_what_train_would_refuse(tmp_path: Path) -> None:
    recipe = online_recipe(tmp_path, {**GRPO, "rewards": [{"type": "exact_match", "column": "gone"}]})
    found = check(recipe)
    with pytest.raises(LuthierError) as caught:
        luthier.train(recipe)
    assert [problem.message for problem in found.problems] == [str(caught.value)]
    assert "gone" in found.problems[0].message


# --------------------------------------------------------------------------------------------------
# selfcheck


@pytest.mark.parametrize("stage", [GRPO, PPO], ids=["grpo", "ppo"])
def test_selfcheck_holds(stage: dict[str, Any], tmp_path: Path) -> None:
    result = selfcheck(online_recipe(tmp_path, stage), folder=tmp_path, quiet=True)
    assert [outcome.check for outcome in result.outcomes] == list(CHECKS)
    assert result.holds, [outcome for outcome in result.outcomes if not outcome.holds]
    left_out = {outcome.check for outcome in result.outcomes if outcome.left_out}
    assert left_out == {"mean", "accumulation", "processes"} | ({"shared"} if stage is PPO else set())
    measured = {outcome.check: outcome.measured for outcome in result.outcomes}
    assert measured["prompts"] == measured["learnt"] == measured["resumed"] == 0
    assert 0 < measured["sampled"] < 1e-4


def test_selfcheck_sees_an_engine_that_draws_from_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = online_recipe(tmp_path, GRPO)
    recipe["generation"]["temperature"] = 0.7
    honest = selfcheck(recipe, only=["sampled"], quiet=True)
    assert honest.holds and "temperature 0.7" in honest.outcomes[0].detail
    recipe["generation"] = {**recipe["generation"], "repetition_penalty": 1.0}
    from luthier.selfcheck import rollout_checks

    plain = rollout_checks.rollout_settings

    def at_one(said: Any, **options: Any) -> Any:
        return plain({**said, "temperature": 1.0}, **options)

    monkeypatch.setattr(rollout_checks, "rollout_settings", at_one)
    (outcome,) = selfcheck(recipe, only=["sampled"], quiet=True).outcomes
    assert not outcome.holds and outcome.measured > 0.01


# --------------------------------------------------------------------------------------------------
# prepare, and runs as models


def test_prepare_makes_prompts(tmp_path: Path) -> None:
    data = prepare(online_recipe(tmp_path, GRPO), quiet=True)
    assert len(data.train) == 11
    assert all(not sample.weights.any() for sample in data.train)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    recipe = online_recipe(folder, {**GRPO, "kl": {"coefficient": 0.1}})
    recipe["stage"]["rewards"].append({"type": "length", "most": 4, "weight": 0.5})
    recipe["train"] |= {"max_steps": 1}
    return luthier.train(recipe, quiet=True).output


def test_a_run_answers(run: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.json").write_text(json.dumps([{"instruction": "Say 3.", "output": "3"}]))
    options = ["--output", str(tmp_path / "answers"), "generation.max_new_tokens=4"]
    result = CliRunner().invoke(app, ["predict", str(run), "--data", str(tmp_path / "asked.json"), *options])
    assert result.exit_code == 0, result.output


def test_a_run_is_exported(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(run), "--output", str(tmp_path / "whole")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_a_run_is_no_reward_model(run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    result = CliRunner().invoke(app, ["score", str(run), str(tmp_path / "rows.json")])
    assert result.exit_code == 2
    assert "is a run of stage grpo; scores come from a reward model (stage.type: rm)" in result.output


def test_the_card_tells_the_stage_and_no_folders(run: Path) -> None:
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "- grpo\n" in card and "stage `grpo`, reference `start`" in card
    assert "pipeline_tag: text-generation" in card
    assert "path: reward.py:low" in card
    assert str(run.parent) not in card
