"""Runs of grpo from a recipe: what a user gives, what is logged, and what happens where something is wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.experience import Completion, RewardError
from luthier.online import LiveSampler
from luthier.trainer import trainer as loop
from luthier.trainer.bad_numbers import BadNumbersError
from luthier.trainer.checkpoint import verify
from luthier.trainer.memory import OutOfMemoryError
from luthier.types import DataError, RunInterrupted
from tests.online import logged, online_recipe

GRPO = {"type": "grpo", "group_size": 3}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter_model.safetensors")


def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in logged(run) if "loss" in line]


def assert_same_run(one: Path, other: Path) -> None:
    assert logged(one) == logged(other)
    assert logged(one, "samples.jsonl") == logged(other, "samples.jsonl")
    for name, tensor in weights(other).items():
        assert torch.equal(weights(one)[name], tensor), name


def test_a_run_logs_rewards_samples_and_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = online_recipe(tmp_path, {**GRPO, "samples_every": 2, "max_samples": 4, "minibatches": 2})
    base["stage"]["rewards"].append({"type": "length", "most": 4, "weight": 0.5, "name": "short"})
    base["data"]["dev_split"] = 2
    base["train"] |= {"plots": True, "eval_every": 2, "save_every": 2, "load_best": True}
    result = luthier.train(base)
    run = result.output
    lines = steps(run)
    assert len(lines) == 6  # 9 prompts are 3 rollouts of 2 updates
    for number, line in enumerate(lines):
        assert ("reward" in line) == (number % 2 == 0)
    first = lines[0]
    names = [name for name in first if name.startswith("reward/")]
    assert sorted(names) == ["reward/low", "reward/short"]
    # The sum of both is what is learnt from.
    assert first["reward"] == pytest.approx(first["reward/low"] + 0.5 * first["reward/short"], abs=1e-6)
    raw = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    for name in (
        "rollout_seconds",
        "rollout_tokens_per_second",
        "update_seconds",
        "update_tokens_per_second",
    ):
        assert raw[0][name] > 0
    samples = logged(run, "samples.jsonl")
    assert [(line["current_steps"], line["rollout"]) for line in samples] == [(1, 0)] * 4 + [(5, 2)] * 4
    for line in samples:
        limit = 100 + line["row"]
        low = sum(ord(character) < limit for character in line["completion"]) / 10
        assert line["prompt"].startswith(f"<|im_start|>user\nSay {line['row']}.")
        rewards = line["rewards"]
        assert rewards["low"] == pytest.approx(low)
        assert rewards["short"] == pytest.approx(-min(max(line["tokens"] - 4, 0) / 64, 1))
        assert line["reward"] == pytest.approx(low + 0.5 * rewards["short"])
        assert line["finish"] in ("stop", "length")
    evaluations = [line for line in logged(run) if "eval_reward" in line]
    assert [line["current_steps"] for line in evaluations[:3]] == [2, 4, 6]
    assert "eval_loss" not in evaluations[0]
    assert "eval_tokens_per_second" not in raw[-1]
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["best_metric"] == max(line["eval_reward"] for line in evaluations[:3])
    assert result.metrics["eval_reward"] == state["best_metric"]
    for name in ("loss", "reward", "eval_reward"):
        assert (run / f"training_{name}.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "eval_reward" in shown


def test_prompts_come_from_any_form_of_rows(tmp_path: Path) -> None:
    """Alpaca without an answer, messages that end with the user or with an answer, and pairs: each with its own row."""
    base = online_recipe(tmp_path, {**GRPO, "prompts_per_rollout": 8, "max_samples": 99})
    asked = [{"role": "user", "content": "Say it."}]
    answer = {"role": "assistant", "content": "so"}
    tables: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
        "alpaca": ({}, [{"instruction": "Say a.", "limit": 101}]),
        "asked": ({"formatting": "openai"}, [{"messages": asked, "limit": 102}]),
        "answered": ({"formatting": "openai"}, [{"messages": [*asked, answer], "limit": 104}]),
        "pairs": (
            {"ranking": True, "columns": {"chosen": "better", "rejected": "worse"}},
            [{"instruction": "Say b.", "better": "y", "worse": "n", "limit": 105}],
        ),
    }
    sets = []
    for name, (described, rows) in tables.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        sets.append({"name": name, "file_name": f"{name}.json", **described})
    base["data"]["train"] = sets
    (tmp_path / "reward.py").write_text(
        "def low(completions):\n"
        "    told = {one.prompt.source: (one.prompt.label, one.prompt.row['limit']) for one in completions}\n"
        "    expected = {'alpaca': (None, 101), 'asked': (None, 102), 'answered': ('so', 104), 'pairs': ('y', 105)}\n"
        "    assert told == expected, told\n"
        "    assert all(one.prompt.conversation.messages[-1].role == 'user' for one in completions)\n"
        "    return [len(one) for one in completions]\n"
    )
    run = luthier.train(base, quiet=True).output
    prompts = {line["dataset"]: line["prompt"] for line in logged(run, "samples.jsonl")}
    assert (
        prompts["asked"]
        == prompts["answered"]
        == "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "Say b." in prompts["pairs"]
    assert len(steps(run)) == 1


def test_groups_of_equal_rewards_teach_nothing(tmp_path: Path) -> None:
    base = online_recipe(tmp_path, {**GRPO, "minibatches": 2})
    base["stage"]["rewards"] = [{"type": "function", "path": f"{tmp_path / 'reward.py'}:same"}]
    run = luthier.train(base, quiet=True).output
    assert [line["loss"] for line in steps(run)] == [0.0] * 8
    assert [line["grad_norm"] for line in steps(run)] == [0.0] * 8
    assert steps(run)[0]["group/zero_variance"] == 1.0
    lora_b = [tensor for name, tensor in weights(run).items() if "lora_B" in name]
    assert lora_b
    assert not any(tensor.any() for tensor in lora_b)  # they begin as zeros


def test_a_reward_that_fails_stops_the_run_with_the_row(tmp_path: Path) -> None:
    base = online_recipe(tmp_path, {**GRPO, "prompts_per_rollout": 1})
    base["stage"]["rewards"] = [{"type": "function", "path": f"{tmp_path / 'reward.py'}:broken"}]
    base["data"]["shuffle"] = False
    base["train"]["save_every"] = 1
    with pytest.raises(RewardError, match=r"rows, row 3: .*no such thing"):
        luthier.train(base, quiet=True)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{k}" for k in (1, 2, 3)]
    for checkpoint in run.glob("checkpoint-*"):
        verify(checkpoint)
    assert {line["rollout"] for line in logged(run, "samples.jsonl")} == {0, 1, 2}


def test_prompts_without_room_for_an_answer_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = online_recipe(tmp_path, GRPO, num_rows=3, max_position_embeddings=64)
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows.append({"instruction": "x" * 60, "limit": 1})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run = luthier.train(base).output
    said = " ".join(capsys.readouterr().out.split())
    assert "note: data.train: 1 prompts leave no room for an answer, and are left out" in said
    assert {line["row"] for line in logged(run, "samples.jsonl")} == {0, 1, 2}
    (tmp_path / "rows.json").write_text(json.dumps(rows[3:]))
    with pytest.raises(DataError, match=r"data.train: no prompt leaves room"):
        luthier.train(base, [f"train.output={tmp_path / 'other'}"], quiet=True)
    assert not (tmp_path / "other" / "recipe.yaml").exists()


@pytest.mark.parametrize("at", [2, 13], ids=["in the first rollout", "in the second"])
def test_a_signal_in_sampling_saves_and_stops_at_once(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = online_recipe(tmp_path, {**GRPO, "minibatches": 2})
    straight = luthier.train(base, [f"train.output={tmp_path / 'straight'}"], quiet=True).output
    made, done = LiveSampler._completion, list[Completion]()

    def counted(self: LiveSampler, *arguments: Any) -> Completion:
        done.append(made(self, *arguments))
        if len(done) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return done[-1]

    monkeypatch.setattr(LiveSampler, "_completion", counted)
    with pytest.raises(RunInterrupted, match="SIGTERM: stopped after step"):
        luthier.train(base, quiet=True)
    assert len(done) == at  # 9 answers make a rollout
    monkeypatch.undo()
    run = tmp_path / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == (["checkpoint-2"] if at == 13 else [])
    luthier.train(base, ["train.resume=auto"] if at == 13 else ["train.overwrite=true"], quiet=True)
    assert_same_run(run, straight)


def test_eval_only_tells_the_rewards(tmp_path: Path) -> None:
    base = online_recipe(tmp_path, GRPO)
    base["data"]["dev_split"] = 4
    base["train"]["eval_only"] = True
    first = luthier.train(base, quiet=True)
    again = luthier.train(base, [f"train.output={tmp_path / 'again'}"], quiet=True)
    assert first.metrics["eval_reward"] == again.metrics["eval_reward"] != 0
    assert first.metrics["eval_completion/length"] > 0
    assert not (first.output / "samples.jsonl").exists()


def test_smaller_passes_give_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out in the updates: `train.fit_memory` cuts them smaller, and the loss stays."""
    base = online_recipe(tmp_path, {**GRPO, "minibatches": 2}, num_rows=3)
    straight = luthier.train(base, [f"train.output={tmp_path / 'straight'}"], quiet=True).output
    whole = loop.PeftTrainer._run_passes
    sizes: list[int] = []

    def little_memory(self: Any, model: Any, passes: Any) -> Any:
        for batch in passes:
            sizes.append(batch.num_tokens)
            if batch.num_tokens > 60:
                raise OutOfMemoryError(batch)
        return whole(self, model, passes)

    monkeypatch.setattr(loop.PeftTrainer, "_run_passes", little_memory)
    run = luthier.train(base, ["train.fit_memory=true"], quiet=True).output
    assert max(sizes) > 60 > sizes[-1]
    for line, expected in zip(steps(run), steps(straight), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_the_policy_too_far_leaves_steps_out(tmp_path: Path) -> None:
    base = online_recipe(tmp_path, {**GRPO, "epochs": 4, "target_kl": 1e-9}, num_rows=6)
    base["train"]["save_every"] = 1
    run = luthier.train(base, quiet=True).output
    left_out = [line["updates_left_out"] for line in steps(run)]
    # The first update begins where the policy is; the second sees that it moved.
    assert left_out == [0.0, 0.0, 1.0, 1.0] * 2
    assert [line["loss"] == "NaN" for line in steps(run)] == [value == 1.0 for value in left_out]
    rates = [line["learning_rate"] for line in steps(run)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 8  # the schedule goes on

    def saved(step: int) -> dict[str, torch.Tensor]:
        return load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors")

    for name, tensor in saved(2).items():
        assert torch.equal(tensor, saved(4)[name]), name
    assert any(not torch.equal(tensor, saved(1)[name]) for name, tensor in saved(2).items())


def test_a_bad_step_of_a_rollout_is_dealt_with_as_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = online_recipe(tmp_path, {**GRPO, "minibatches": 2}, num_rows=6)
    whole = loop.PeftTrainer._run_passes

    def nan_in_step_3(self: Any, model: Any, passes: Any) -> Any:
        loss, metrics = whole(self, model, passes)
        return (loss * float("nan") if self.state.global_step == 2 else loss), metrics

    monkeypatch.setattr(loop.PeftTrainer, "_run_passes", nan_in_step_3)
    with pytest.raises(BadNumbersError, match=r"step 3: the loss is nan; its rows are rows \d"):
        luthier.train(base, quiet=True)
    run = luthier.train(
        base, ["train.bad_numbers.action=skip", f"train.output={tmp_path / 'skip'}"], quiet=True
    ).output
    assert [line["loss"] == "NaN" for line in steps(run)] == [False, False, True, False]
    rewound = luthier.train(
        base,
        ["train.bad_numbers.action=rewind", "train.save_every=1", f"train.output={tmp_path / 'rewind'}"],
        quiet=True,
    ).output
    # Step 3 samples the second rollout; without it there is nothing for step 4.
    assert [line["loss"] == "NaN" for line in steps(rewound)] == [False, False, True, True]


def test_padded_rows_learn_the_same(tmp_path: Path) -> None:
    base = online_recipe(tmp_path, {**GRPO, "minibatches": 2, "importance_cap": 2.0}, num_rows=3)
    flat = luthier.train(base, quiet=True).output
    for side in ("left", "right"):
        model = ["model.rows=padded", f"model.padding_side={side}"]
        run = luthier.train(base, [*model, f"train.output={tmp_path / side}"], quiet=True).output
        for line, expected in zip(steps(run), steps(flat), strict=True):
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
            assert line.get("reward") == expected.get("reward")


def test_the_whole_model_trains_too(tmp_path: Path) -> None:
    base = online_recipe(tmp_path, {**GRPO, "kl": {"coefficient": 0.1}}, num_rows=6)
    base["method"] = {"type": "full"}
    run = luthier.train(base, quiet=True).output
    assert steps(run)[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert steps(run)[1]["kl"] > 0
