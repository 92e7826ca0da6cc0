"""Precision and run options through `luthier.train`: what is switched on in a run, and off again after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.types import ModelError
from tests.tiny import chat_model, write_alpaca

WATCH = '''
import json
import torch
from transformers import TrainerCallback

class Switches(TrainerCallback):
    """Notes torch's switches at every step, beside the run."""

    def on_step_end(self, args, state, control, **kwargs):
        with open(args.output_dir + ".switches", "a") as file:
            print(json.dumps([torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32]), file=file)

class NotDeterministic(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        torch.zeros(3).put_(torch.tensor([0, 1]), torch.ones(2))
'''


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    write_alpaca(tmp_path / "rows.json", 20)
    (tmp_path / "watch.py").write_text(WATCH)
    return {
        "model": {"path": str(chat_model(tmp_path / "model", attention_dropout=0.1))},
        "data": {
            "train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache"), "dev_split": 4,
        },
        "method": {"type": "lora", "rank": 4, "dropout": 0.1},
        "optim": {"lr": 1e-2},
        "train": {
            "tokens_per_batch": 300, "max_steps": 3, "log_every": 1, "save_every": None, "plots": False,
            "callbacks": [f"{tmp_path / 'watch.py'}:Switches"],
        },
    }  # fmt: skip


def run(recipe: dict[str, Any], output: Path, *overrides: str) -> luthier.run.TrainResult:
    return luthier.train(recipe, [f"train.output={output}", *overrides], quiet=True)


def switches(output: Path) -> list[list[bool]]:
    return [json.loads(line) for line in Path(f"{output}.switches").read_text().splitlines()]


def lines(output: Path, key: str) -> list[float]:
    entries = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


def test_deterministic_runs_have_the_same_bits(recipe: dict[str, Any], tmp_path: Path) -> None:
    """With several threads; the switch holds for the run alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        outputs = [
            run(recipe, tmp_path / name, "train.deterministic=true").output for name in ("first", "second")
        ]
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()
    assert [switches(output) for output in outputs] == [[[True, True]] * 3] * 2
    for key in ("loss", "grad_norm", "eval_loss"):
        first, second = (lines(output, key) for output in outputs)
        assert first == second and first
    first, second = (load_file(output / "adapter_model.safetensors") for output in outputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_deterministic_kernel_the_run_ends(recipe: dict[str, Any], tmp_path: Path) -> None:
    callbacks = f"train.callbacks=[{tmp_path / 'watch.py'}:NotDeterministic]"
    with pytest.raises(
        ModelError, match=r"^train\.deterministic=true: torch has no deterministic kernel for put_ "
    ):
        run(recipe, tmp_path / "run", "train.deterministic=true", callbacks)
    assert not torch.are_deterministic_algorithms_enabled()
    run(recipe, tmp_path / "other", callbacks)


def test_tensorfloat32_off(recipe: dict[str, Any], tmp_path: Path) -> None:
    before = torch.backends.cudnn.allow_tf32
    assert switches(run(recipe, tmp_path / "off", "train.tf32=false").output) == [[False, False]] * 3
    assert switches(run(recipe, tmp_path / "left").output) == [[False, before]] * 3
    assert torch.backends.cudnn.allow_tf32 == before


def test_float16_on_this_processor(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Trained with loss scaling, evaluated in float32: the loss is that of the saved adapter without autocast."""
    half = run(recipe, tmp_path / "half", "train.precision=fp16", "train.eval_precision=fp32")
    assert lines(half.output, "loss_scale")[0] >= 2.0**12
    evaluation = [
        "train.eval_only=true",
        f"method.adapters=[{half.output}]",
        "train.max_steps=null",
    ]
    again = {
        name: run(recipe, tmp_path / name, *evaluation, f"train.precision={name}").metrics["eval_loss"]
        for name in ("fp32", "bf16", "fp16")
    }
    assert half.metrics["eval_loss"] == pytest.approx(again["fp32"], rel=1e-6)
    assert len(set(again.values())) == 3
    assert again["fp16"] == pytest.approx(again["fp32"], rel=1e-2)
    assert lines(half.output, "loss") != lines(run(recipe, tmp_path / "full").output, "loss")


@pytest.mark.parametrize(
    "option", ["train.compile={backend: eager}", "train.neftune_alpha=5", "train.fit_memory=true"]
)
def test_options_together_with_float16_and_checkpointing(
    option: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Each runs with the others' arithmetic; noise alone changes the numbers."""
    common = ["train.precision=fp16", "model.gradient_checkpointing=true"]
    plain = run(recipe, tmp_path / "plain", *common)
    other = run(recipe, tmp_path / "other", *common, option)
    same = lines(other.output, "loss") == pytest.approx(lines(plain.output, "loss"), rel=1e-3)
    assert same is ("neftune" not in option)
    assert json.loads((other.output / "run.json").read_text())["tokens_per_pass"] == 512


@pytest.mark.parametrize(
    "option",
    [
        "model.gradient_checkpointing={every: 2}",
        "model.gradient_checkpointing={reentrant: true}",
        "model.activation_offload=true",
        "model.gradient_checkpointing=true model.activation_offload=true",
    ],
)
def test_what_saves_memory_changes_no_bit(option: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    plain = run(recipe, tmp_path / "plain")
    other = run(recipe, tmp_path / "other", *option.replace(" model", "\nmodel").split("\n"))
    assert lines(other.output, "loss") == lines(plain.output, "loss")
    first, second = (load_file(one.output / "adapter_model.safetensors") for one in (plain, other))
    assert all(torch.equal(second[name], weight) for name, weight in first.items())


def test_a_machine_that_moves_nothing_says_so(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    luthier.train(recipe, [f"train.output={tmp_path / 'run'}", "model.activation_offload=true"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "note: model.activation_offload moves nothing here: the memory of a cpu device is the host's" in said
    )
