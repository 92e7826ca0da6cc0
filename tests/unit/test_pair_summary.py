"""The preference benchmark's arithmetic on rounds that were made up, and the pairs that it hands to every contender."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def pair_summary(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("pair_summary")


def line(**changes: Any) -> dict[str, Any]:
    measured = {
        "tokens": 600,
        "seconds": 20.0,
        "cpu_seconds": 30.0,
        "timed_steps": 2,
        "tokens_of_steps": [300, 300, 300],
        "losses": [math.log(2), 0.6, 0.5],
        "answer_logprobs": [(-100.0, -200.0)] * 3,
        "initial_weights": "same",
        "seconds_of": {},
        "peak_before_mib": 1000.0,
        "peak_training_mib": 3000.0,
    }
    return {**measured, **changes}


def test_ratios_and_targets(pair_summary: ModuleType) -> None:
    slow = line(seconds=80.0, cpu_seconds=60.0, peak_training_mib=9000.0)
    cached = line(seconds=10.0, seconds_of={"precompute": 12.0}, peak_before_mib=4000.0)
    one = {"luthier": line(), "luthier_cached": cached, "trl": slow}
    result = pair_summary.summarise([one], list(one))
    assert result["contenders"]["luthier"]["tokens_per_second"]["median"] == 30.0
    assert result["contenders"]["luthier_cached"]["precompute_seconds_per_step"]["median"] == 4.0
    assert result["contenders"]["luthier_cached"]["peak_process_mib"]["median"] == 4000.0
    over = result["over"]["luthier"]["trl"]
    assert (over["speed"]["median"], over["thrift"]["median"], over["peak"]["median"]) == (4.0, 2.0, 1 / 3)
    met = {row["target"]: row["met"] for row in result["targets"]}
    assert met == {
        "speed of luthier over trl": True,
        "peak memory of luthier over trl": True,
        "speed of luthier_cached over trl": True,
        "peak memory of luthier_cached over trl": False,
    }
    assert result["losses"]["agree"]


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": [math.log(2), 0.6, 0.5002]},
        {"losses": [math.log(2) + 2e-4, 0.6, 0.5]},
        {"answer_logprobs": [(-100.0, -200.0), (-100.0, -200.03), (-100.0, -200.0)]},
        {"initial_weights": "other"},
    ],
)
def test_what_is_not_the_same_training_is_said(pair_summary: ModuleType, changes: dict[str, Any]) -> None:
    one = {"luthier": line(), "trl": line(**changes)}
    assert not pair_summary.same_losses([one], list(one))["agree"]


def test_a_contender_that_logs_no_logprobs_is_compared_by_its_losses(pair_summary: ModuleType) -> None:
    one = {"luthier": line(), "trl": line(answer_logprobs=[])}
    assert pair_summary.same_losses([one], list(one))["agree"]


def test_pairs_are_what_the_models_own_template_writes(
    monkeypatch: pytest.MonkeyPatch, shared_data: Path, smollm2: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pairs, rows = importlib.import_module("pairs").load(smollm2, shared_data, "dpo_en_demo", 8, 256)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    expected = []
    for row in json.loads((shared_data / "dpo_en_demo.json").read_text(encoding="utf-8"))[:rows]:
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        pair = {"prompt_ids": prompt}
        for name in ("chosen", "rejected"):
            answer = [{"role": "assistant", "content": row[name]["value"]}]
            whole = tokenizer.apply_chat_template(messages + answer, return_dict=False)[len(prompt) :]
            pair[f"{name}_ids"] = whole[: whole.index(tokenizer.eos_token_id) + 1]
        if len(prompt) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) <= 255:
            expected.append(pair)
    assert pairs == expected
    assert len(pairs) == 8
