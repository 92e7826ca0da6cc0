"""Optimizer steps of PeftTrainer = those of a plain transformers.Trainer on right-padded rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, set_seed

import luthier
from luthier.data.encode import EncodeOptions
from luthier.data.prepare import Preparation, prepare
from luthier.data.template import load_template
from luthier.model.load import load_tokenizer, locate
from luthier.recipe.schema import DataSpec, LoraSpec, ModelSpec, SftSpec
from luthier.stages import build_stage
from luthier.types import Sample
from tests.reference import padded_rows
from tests.tiny import random_samples, tiny_model
from tests.training import assert_same_weights, history, recipe_of, trainer_of, weights

SEED = 42
LENGTHS = [9, 30, 4, 17, 12, 40, 6, 8, 25, 3, 11, 19, 22, 5]
"""Fourteen rows: with two rows and three accumulation steps, the last window of an epoch holds two rows of six."""


class Rows(torch.utils.data.Dataset[Sample]):
    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    ids, mask, labels = padded_rows(samples)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_trainer(model: nn.Module, samples: Sequence[Sample], output: Path, **arguments: Any) -> Trainer:
    """transformers' Trainer as anyone would set it up."""
    args = TrainingArguments(
        str(output),
        seed=SEED,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **arguments,
    )
    return Trainer(model=model, args=args, train_dataset=Rows(samples), data_collator=collate)


def zero_one(samples: Sequence[Sample]) -> list[Sample]:
    return [
        Sample(sample.input_ids, np.sign(sample.weights), sample.source, sample.index) for sample in samples
    ]


def with_lora(model: PreTrainedModel, spec: LoraSpec) -> PeftModel:
    """The adapter that anyone would draw with PEFT after seeding."""
    set_seed(SEED)
    targets = spec.targets if isinstance(spec.targets, str) else list(spec.targets)
    config = LoraConfig(r=spec.rank, lora_alpha=2 * spec.rank, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


@pytest.mark.parametrize("tokens_per_pass", [1, 50, 1000])
@pytest.mark.parametrize("family", ["llama", "gemma3-window"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_ten_steps(method: str, family: str, tokens_per_pass: int, tmp_path: Path) -> None:
    """AdamW with decay, warm-up, cosine and clipping, over four epochs in a new order each."""
    samples = zero_one(random_samples(LENGTHS))
    spec: dict[str, Any] = {"type": "lora", "rank": 4} if method == "lora" else {"type": "full"}
    recipe = recipe_of(
        tmp_path / "mine",
        method=spec,
        optim={"lr": 5e-3, "eps": 1e-6, "weight_decay": 0.1, "warmup": 0.25, "max_grad_norm": 0.7},
        train={"rows_per_device": 2, "accumulation": 3, "max_steps": 10, "tokens_per_pass": tokens_per_pass},
    )
    mine = trainer_of(recipe, tiny_model(family), samples)
    model: Any = tiny_model(family, "eager")
    if method == "lora":
        assert isinstance(recipe.method, LoraSpec)
        model = with_lora(model, recipe.method)
    plain = plain_trainer(
        model,
        samples,
        tmp_path / "plain",
        learning_rate=5e-3,
        adam_epsilon=1e-6,
        weight_decay=0.1,
        warmup_steps=3,  # a quarter of ten, rounded up
        max_grad_norm=0.7,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=10,
    )
    start = weights(mine.model)
    for name, weight in weights(plain.model).items():
        assert torch.equal(start[name], weight), name
    mine.train()
    plain.train()
    losses = history(plain, "loss")
    assert len(losses) == 10
    assert history(mine, "loss") == pytest.approx(losses, rel=1e-4)
    assert history(mine, "learning_rate") == pytest.approx(history(plain, "learning_rate"), rel=1e-12)
    norms = history(plain, "grad_norm")
    assert history(mine, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 0.7  # clipping had something to do
    assert_same_weights(weights(mine.model), weights(plain.model), start, 1e-3)


def test_epochs_and_their_steps(tmp_path: Path) -> None:
    """The same number of steps, epochs and rows as transformers counts, without shuffling too."""
    samples = zero_one(random_samples(LENGTHS))
    optim: dict[str, Any] = {"type": "sgd", "lr": 0.02, "schedule": "linear", "max_grad_norm": 0}
    rows = {"rows_per_device": 2, "accumulation": 3, "epochs": 2}
    recipe = recipe_of(tmp_path / "mine", method={"type": "full"}, optim=optim, train=rows)
    mine = trainer_of(recipe, tiny_model("llama"), samples)
    plain = plain_trainer(
        tiny_model("llama", "sdpa"),
        samples,
        tmp_path / "plain",
        learning_rate=0.02,
        optim="sgd",
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        num_train_epochs=2,
    )
    start = weights(mine.model)
    mine.train()
    plain.train()
    assert mine.state.global_step == plain.state.global_step == 6
    assert history(mine, "epoch") == pytest.approx(history(plain, "epoch"), abs=0.34)
    assert history(mine, "epoch")[-1] == history(plain, "epoch")[-1] == 2.0
    assert history(mine, "loss") == pytest.approx(history(plain, "loss"), rel=1e-4)
    assert_same_weights(weights(mine.model), weights(plain.model), start, 1e-3)


@pytest.mark.slow
def test_real_model(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    """`luthier.train` on SmolLM2-135M: three steps of LoRA on fifteen real rows, the last step uneven."""
    data = {
        "train": ["alpaca_en_demo"], "directory": str(shared_data), "max_samples": 15, "max_length": 48,
        "overflow": "truncate", "max_lost": None, "cache": str(tmp_path / "cache"),
    }  # fmt: skip
    method = {"type": "lora", "rank": 8, "targets": ["q_proj", "v_proj", "down_proj"]}
    output = tmp_path / "run"
    luthier.train(
        {
            "model": {"path": str(smollm2)}, "data": data, "method": method,
            "optim": {"lr": 1e-3, "eps": 1e-4, "warmup": 1, "weight_decay": 0.01},
            "train": {
                "output": str(output), "rows_per_device": 2, "accumulation": 3, "epochs": 1, "log_every": 1,
                "save_every": None, "plots": False, "seed": SEED, "precision": "fp32",
            },
        },
        quiet=True,
    )  # fmt: skip
    samples = rows_of(smollm2, DataSpec.model_validate(data))
    assert len(samples) == 15
    assert max(map(len, samples)) == 48
    model = AutoModelForCausalLM.from_pretrained(smollm2, attn_implementation="sdpa", dtype=torch.float32)
    plain = plain_trainer(
        with_lora(model, LoraSpec.model_validate(method)),
        samples,
        tmp_path / "plain",
        learning_rate=1e-3,
        adam_epsilon=1e-4,  # a tiny one makes a whole step of a gradient that is only rounding
        warmup_steps=1,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        num_train_epochs=1,
    )
    start = weights(plain.model)
    plain.train()
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 3
    assert losses == pytest.approx(history(plain, "loss"), rel=1e-4)
    saved = load_file(output / "adapter_model.safetensors")
    actual = {name.replace(".weight", ".default.weight"): tensor for name, tensor in saved.items()}
    # AdamW magnifies what torch's float32 log_softmax over a real vocabulary leaves out (3e-5 of a gradient).
    assert_same_weights(actual, weights(plain.model), start, 5e-3)


def rows_of(model: Path, spec: DataSpec) -> list[Sample]:
    """The tokenized rows of a recipe's data."""
    stage = build_stage(SftSpec(), EncodeOptions.of(spec, "sft"))
    source = ModelSpec(path=str(model))
    template = load_template(load_tokenizer(source, locate(source)), spec)
    how = Preparation(stage.encode, template, "conversation", {"stage": "sft"}, seed=SEED)
    return prepare(spec, how).train[:]
