"""Two processes under DeepSpeed's ZeRO are one plain process: losses, norms, weights, optimizer, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import luthier
from luthier.trainer.checkpoint import verify
from tests.compared import LORA
from tests.deepspeed_runs import (
    Runs,
    alone,
    assert_same_run,
    divided,
    furthest,
    goes_on,
    logged,
    nan_in_third_step,
    parallel_of,
    recipe,
)

pytest.importorskip(
    "deepspeed", reason="deepspeed is not installed: pip install --no-build-isolation deepspeed"
)

FAST = {"sft 1": ("sft", 1), "sft 2": ("sft", 2), "sft 3": ("sft", 3), "dpo-lora 3": ("dpo-lora", 3)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("deepspeed"))
    bases = {
        "sft": found.base("sft", recipe(found.folder / "sft", "sft")),
        "dpo-lora": found.base("dpo-lora", recipe(found.folder / "dpo", "dpo", LORA)),
    }
    for label, (name, zero) in FAST.items():
        found.add(label, divided(bases[name], found.folder / "two" / label, zero))
    again = divided(bases["sft"], found.folder / "two" / "from one", 3)
    found.add("from one", goes_on(again, found.one["sft"] / "checkpoint-2"))
    found.add("nan", divided(bases["sft"], found.folder / "two" / "nan", 2), nan_in_third_step)
    found.recipes["sft"] = bases["sft"]
    found.said["sft"] = []
    found.changes["sft"] = None
    found.train()
    return found


@pytest.mark.parametrize("label", FAST)
def test_two_processes_are_one(label: str, runs: Runs) -> None:
    name, zero = FAST[label]
    assert runs.said[label] == ["", ""]
    assert_same_run(runs.two(label), runs.one[name])
    assert parallel_of(runs.two(label)) == {
        "type": "deepspeed",
        "processes": 2,
        "wrapped": f"DeepSpeedEngine, ZeRO-{zero}",
    }
    verify(runs.two(label) / "checkpoint-4")


def test_what_was_saved_loads_in_plain_transformers(runs: Runs) -> None:
    ids = torch.arange(3, 40)[None]
    found, expected = (
        AutoModelForCausalLM.from_pretrained(run)(ids).logits.detach()
        for run in (runs.two("sft 3"), runs.one["sft"])
    )
    start = AutoModelForCausalLM.from_pretrained(runs.folder / "sft" / "model")(ids).logits.detach()
    assert float((expected - start).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_checkpoint_of_one_process_goes_on_in_two(runs: Runs) -> None:
    assert runs.said["from one"] == ["", ""]
    assert_same_run(runs.two("from one"), runs.one["sft"])


@pytest.mark.parametrize("zero", [2, 3])
def test_a_checkpoint_of_two_processes_goes_on_in_one_plain_one(
    zero: int, runs: Runs, tmp_path: Path
) -> None:
    made = goes_on(alone(runs.recipes["sft"], tmp_path / "run"), runs.two(f"sft {zero}") / "checkpoint-2")
    luthier.train(made, quiet=True)
    assert_same_run(tmp_path / "run", runs.one["sft"])
    assert parallel_of(tmp_path / "run")["type"] == "ddp"


def test_a_step_that_is_no_number_stops_before_it_is_taken(runs: Runs) -> None:
    """The gradients of one process alone are bad; nothing of the step is kept."""
    first, second = runs.said["nan"]
    assert first.startswith("BadNumbersError: step 3: the gradient norm is inf")
    assert second.startswith("BadNumbersError: step 3: the gradient norm is inf")
    run = runs.two("nan")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2"]
    verify(run / "checkpoint-2")
    assert furthest(run / "checkpoint-2", runs.two("sft 2") / "checkpoint-2") == 0
    assert not (run / "run.json").exists()
    assert logged(run, "loss") == logged(runs.two("sft 2"), "loss")[:2]
    assert (
        json.loads((run / "bad_numbers.jsonl").read_text(encoding="utf-8").splitlines()[0])["current_steps"]
        == 3
    )
