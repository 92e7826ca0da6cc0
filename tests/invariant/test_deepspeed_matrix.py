"""Every stage and method under every ZeRO stage, and what a recipe may say beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.compared import FULL, LORA
from tests.deepspeed_runs import (
    ALL_DIVIDED,
    Runs,
    alone,
    assert_same_run,
    divided,
    every_pass_is_the_last,
    furthest,
    goes_on,
    logged,
    parallel_of,
    recipe,
)
from tests.tiny import chat_model

pytest.importorskip(
    "deepspeed", reason="deepspeed is not installed: pip install --no-build-isolation deepspeed"
)
pytestmark = pytest.mark.slow
long = pytest.mark.long

HEAD = {"type": "lora", "rank": 4, "targets": ["q_proj", "v_proj", "lm_head"]}
"""An adapter on the output head, which is called once for each chunk of targets."""
METHODS = {"full": FULL, "lora": LORA, "head": HEAD}
MATRIX = [
    *((stage, "full", zero) for stage in ("pt", "dpo", "rm") for zero in (1, 2, 3)),
    *((stage, "lora", zero) for stage in ("sft", "dpo", "rm") for zero in (1, 2, 3)),
    ("sft", "head", 2),
]


def named(stage: str, method: str, zero: int) -> str:
    return f"{stage}-{method} {zero}"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("matrix"))
    for stage, method, zero in MATRIX:
        name = f"{stage}-{method}"
        made = recipe(found.folder / name, stage, METHODS[method], eval_every=4, save_every=4)
        if name not in found.one:
            found.base(name, made)
        if (stage, method, zero) == ("dpo", "full", 3):
            made["stage"]["reference"] = (
                "precompute"  # a copy of weights cannot be swapped in for divided ones
            )
        found.add(
            named(stage, method, zero), divided(made, found.folder / "two" / named(stage, method, zero), zero)
        )
    head = recipe(found.folder / "sft-head", "sft", HEAD)
    found.add("refused", divided(head, found.folder / "two" / "refused", 3))
    return found


def test_an_adapter_on_a_divided_head_is_refused(matrix: Runs) -> None:
    matrix.train(only=["refused"])
    first, second = matrix.said["refused"]
    assert first == second
    assert first.startswith(
        "ModelError: parallel: deepspeed with zero: 3 does not go with an adapter on the output head"
    )


@pytest.mark.parametrize(("stage", "method", "zero"), MATRIX)
def test_two_processes_are_one(stage: str, method: str, zero: int, matrix: Runs) -> None:
    label = named(stage, method, zero)
    if label not in matrix.said:  # in three sets of processes, so that no test takes all of their time
        place = MATRIX.index((stage, method, zero))
        matrix.train(only=[named(*case) for case in MATRIX[place : place + 7]])
    assert matrix.said[label] == ["", ""]
    assert_same_run(matrix.two(label), matrix.one[f"{stage}-{method}"])
    assert parallel_of(matrix.two(label))["wrapped"] == f"DeepSpeedEngine, ZeRO-{zero}"


def test_adapters_load_in_plain_peft(matrix: Runs) -> None:
    ids = torch.arange(3, 40)[None]
    matrix.train()
    start = matrix.folder / "sft-lora" / "model"

    def logits(run: Path | None) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(start)
        model = base if run is None else PeftModel.from_pretrained(base, run)
        return model(ids).logits.detach()

    found, expected = logits(matrix.two("sft-lora 3")), logits(matrix.one["sft-lora"])
    assert float((expected - logits(None)).abs().max()) > 0.005
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# What a recipe may say beside them


OWN_JSON: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": False},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1000,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 100,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("options"))
    folder, two = found.folder, found.folder / "two"
    sft = found.base("sft", recipe(folder / "sft", "sft"))
    bf16 = found.base("bf16", recipe(folder / "bf16", "sft", precision="bf16"))
    best = recipe(folder / "sft", "sft", load_best=True, eval_every=2, save_every=2, greater_is_better=True)
    found.base("best", best)
    chat_model(folder / "tied" / "model", tie_word_embeddings=True)
    tied = recipe(folder / "tied", "sft")
    tied["model"]["gradient_checkpointing"] = True
    found.base("tied", tied)
    for zero in (2, 3):
        found.add(f"best {zero}", divided(best, two / f"best {zero}", zero))
        found.add(f"offload {zero}", divided(sft, two / f"offload {zero}", zero, offload_optimizer=True))
        found.add(f"bf16 {zero}", divided(bf16, two / f"bf16 {zero}", zero))
        found.add(f"tied {zero}", divided(tied, two / f"tied {zero}", zero))
    found.add("offload both", divided(sft, two / "both", 3, offload_optimizer=True, offload_parameters=True))
    found.add("json", divided(sft, two / "json", 3, config=OWN_JSON))
    found.add("zero 0", divided(sft, two / "zero 0", None, config={"zero_optimization": {"stage": 0}}))
    found.add("fault", divided(sft, two / "fault", 1), every_pass_is_the_last)
    kept = divided(sft, two / "offload again", 2, offload_optimizer=True)
    found.add("offload again", goes_on(kept, found.one["sft"] / "checkpoint-2"))
    found.train()
    return found


@long
@pytest.mark.parametrize(
    "label", ["offload 2", "offload 3", "offload both", "json", "offload again", "zero 0"]
)
def test_options_change_nothing(label: str, options: Runs) -> None:
    assert options.said[label] == ["", ""]
    assert_same_run(options.two(label), options.one["sft"])
    expected = "DistributedDataParallel" if label == "zero 0" else "DeepSpeedEngine"
    assert parallel_of(options.two(label))["wrapped"].startswith(expected)


@long
@pytest.mark.parametrize("zero", [2, 3])
def test_one_process_keeps_its_optimizer_in_the_hosts_memory(zero: int, options: Runs) -> None:
    """A process that nobody launched."""
    made = alone(options.recipes["json"], options.folder / f"host {zero}")
    made["parallel"] = {"type": "deepspeed", "zero": zero, "offload_optimizer": True}
    recipe, run = options.folder / f"host{zero}.json", options.folder / f"host {zero}"
    recipe.write_text(json.dumps(made), encoding="utf-8")
    words = [sys.executable, "-c", "from luthier.cli import main; main()", "train", str(recipe)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert parallel_of(run) == {
        "type": "deepspeed",
        "processes": 1,
        "wrapped": f"DeepSpeedEngine, ZeRO-{zero}",
    }
    assert_same_run(run, options.one["sft"])


@long
@pytest.mark.parametrize("zero", [2, 3])
def test_tied_embeddings_and_checkpointed_activations(zero: int, options: Runs) -> None:
    assert options.said[f"tied {zero}"] == ["", ""]
    assert_same_run(options.two(f"tied {zero}"), options.one["tied"])


@long
@pytest.mark.parametrize("zero", [2, 3])
def test_bfloat16(zero: int, options: Runs) -> None:
    """Autocast over float32 weights, as in one process: sums of 16-bit products differ by rounding."""
    assert options.said[f"bf16 {zero}"] == ["", ""]
    one, two = options.one["bf16"], options.two(f"bf16 {zero}")
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=5e-3)
    assert logged(one, "loss") != logged(options.one["sft"], "loss")
    assert furthest(two, one) < 0.5 * furthest(options.folder / "bf16" / "model", one)


@long
@pytest.mark.parametrize("zero", [2, 3])
def test_the_best_checkpoint_is_loaded(zero: int, options: Runs) -> None:
    """The largest loss is the best here: that of the first evaluation."""
    assert options.said[f"best {zero}"] == ["", ""]
    assert furthest(options.two(f"best {zero}"), options.two(f"best {zero}") / "checkpoint-2") == 0
    assert furthest(options.two(f"best {zero}"), options.one["best"]) < 1e-5
    assert furthest(options.one["best"], options.one["best"] / "checkpoint-4") > 1e-3


@long
def test_a_planted_fault_is_seen(options: Runs) -> None:
    assert options.said["fault"] == ["", ""]
    assert furthest(options.two("fault"), options.one["sft"]) > 1e-3


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_checkpoint_of_two_processes_goes_on_in_three(zero: int, three: Runs) -> None:
    """Parameters are divided into parts that are not of one size."""
    label = f"three {zero}"
    assert three.said[label] == ["", "", ""]
    assert parallel_of(three.two(label))["processes"] == 3
    assert_same_run(three.two(label), three.one["six"])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("three"))
    # Six rows in a step: 3 x 2, 2 x 3.
    made = recipe(found.folder / "sft", "sft", rows_per_device=6, accumulation=1)
    found.base("six", made, rows_per_device=6)
    made["train"]["rows_per_device"] = 3
    found.add("two", divided(made, found.folder / "two", 2))
    found.train()
    made["train"]["rows_per_device"] = 2
    for zero in (1, 2, 3):
        again = divided(made, found.folder / f"three-{zero}", zero, config=ALL_DIVIDED)
        found.add(f"three {zero}", goes_on(again, found.two("two") / "checkpoint-2"))
    found.train(3)
    return found
