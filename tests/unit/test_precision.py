"""Arithmetic of a run: loss scaling in float16, bfloat16, evaluations of their own, clipping, torch's switches.

The independent side is a plain torch loop with autocast and GradScaler, or the model's own dense logits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, get_cosine_schedule_with_warmup

from luthier.data.collate import flat_batch
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.trainer.arguments import training_arguments
from luthier.trainer.kernels import kernel_rules
from luthier.trainer.trainer import PeftTrainer
from luthier.types import ModelError, RecipeError, Sample
from tests.tiny import random_samples, tiny_model
from tests.training import assert_same_weights, history, recipe_of, trainer_of, weights

LENGTHS = [9, 30, 4, 17, 12, 40, 6, 8, 15, 22, 5, 11]
LR, EPS, DECAY, CLIP = 2e-3, 1e-5, 0.1, 0.7


def trainer(output: Path, model: PreTrainedModel, samples: Sequence[Sample], **train: Any) -> PeftTrainer:
    """Two rows to a step, each a pass of its own, in their order."""
    recipe = recipe_of(
        output,
        method={"type": "full"},
        data={"shuffle": False},
        optim={"lr": LR, "eps": EPS, "weight_decay": DECAY, "max_grad_norm": CLIP, "warmup": 2},
        train={"rows_per_device": 2, "epochs": 1, "tokens_per_pass": 1, **train},
    )
    return trainer_of(recipe, model, samples)


class PlainLoop:
    """What a tutorial on automatic mixed precision writes: autocast, GradScaler, clipping, AdamW, a schedule."""

    def __init__(self, dtype: torch.dtype | None, scaler: torch.amp.GradScaler | None, steps: int) -> None:
        self.model: Any = tiny_model("llama")
        install_target_forward(self.model)
        self.dtype, self.scaler = dtype, scaler
        decayed = [p for name, p in self.model.named_parameters() if "norm" not in name]
        rest = [p for name, p in self.model.named_parameters() if "norm" in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}],
            lr=LR,
            eps=EPS,
        )
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, 2, steps)
        self.logs: list[dict[str, float]] = []

    def step(self, rows: Sequence[Sample], *, overflow: bool = False) -> None:
        weight = torch.tensor([row.weights[1:].sum() for row in rows]).sum()
        log = {"loss": 0.0, "learning_rate": self.schedule.get_last_lr()[0]}
        for row in rows:
            with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
                answers = ModelPolicy(self.model).logprobs(flat_batch([row]))
            weights = torch.from_numpy(row.weights[1:][row.weights[1:] > 0])
            loss = -(weights * answers.logprobs).sum() / weight
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            log["loss"] += loss.item()
        if overflow:
            make_infinite(self.model)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        log["grad_norm"] = float(nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        skipped = False
        if self.scaler is None:
            self.optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            skipped = self.scaler.get_scale() < before
            log |= {"loss_scale": self.scaler.get_scale(), "skipped_steps": int(skipped)}
        if skipped:
            del log["grad_norm"]
        else:
            self.schedule.step()
        self.optimizer.zero_grad()
        self.logs.append(log)


def make_infinite(model: nn.Module) -> None:
    gradient = next(model.parameters()).grad
    assert gradient is not None
    gradient.view(-1)[0] = math.inf


def overflow_at(trainer: PeftTrainer, steps: Collection[int]) -> None:
    """The gradients of these steps (from 0) overflow, before anything looks at them."""
    usual = trainer.training_step

    def training_step(model: nn.Module, *args: Any) -> Tensor:
        loss = usual(model, *args)
        if trainer.state.global_step in steps:
            make_infinite(model)
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign]


def logs_of(trainer: PeftTrainer) -> list[dict[str, float]]:
    names = ("loss", "learning_rate", "grad_norm", "loss_scale", "skipped_steps")
    return [
        {name: entry[name] for name in names if name in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


# --------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_run_is_the_plain_loop(precision: str, tmp_path: Path) -> None:
    """Losses, rates, gradient norms, scales and weights; step 3 overflows, which in fp16 changes nothing."""
    samples = random_samples(LENGTHS)
    mine = trainer(tmp_path, tiny_model("llama"), samples, precision=precision)
    start = weights(mine.model)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}[precision]
    scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None
    plain = PlainLoop(dtype, scaler, len(LENGTHS) // 2)
    if scaler is not None:
        overflow_at(mine, {2})
    mine.train()
    for index in range(0, len(LENGTHS), 2):
        plain.step(samples[index : index + 2], overflow=index == 4 and scaler is not None)
    assert len(plain.logs) == 6
    for mine_log, plain_log in zip(logs_of(mine), plain.logs, strict=True):
        assert mine_log == pytest.approx(plain_log, rel=1e-6)
    assert_same_weights(weights(mine.model), weights(plain.model), start, 1e-3)
    if scaler is not None:
        assert mine.accelerator.scaler.state_dict() == scaler.state_dict()
        skipped = [log["skipped_steps"] for log in plain.logs]
        assert skipped[2] == 1 and sum(skipped) < len(skipped)


def test_precisions_are_other_arithmetic(tmp_path: Path) -> None:
    """The equality above could fail: the three precisions give three losses, near each other."""
    samples = random_samples(LENGTHS)
    losses = {}
    for precision in ("fp32", "fp16", "bf16"):
        run = trainer(tmp_path / precision, tiny_model("llama"), samples, precision=precision, max_steps=1)
        run.train()
        losses[precision] = history(run, "loss")[0]
    assert 1e-6 < abs(losses["fp16"] / losses["fp32"] - 1) < 1e-2
    assert abs(losses["fp16"] / losses["fp32"] - 1) < abs(losses["bf16"] / losses["fp32"] - 1) < 5e-2


def test_a_step_that_overflows_changes_nothing(tmp_path: Path) -> None:
    samples = random_samples(LENGTHS)
    run = trainer(tmp_path, tiny_model("llama"), samples, precision="fp16", log_every=3)
    start = weights(run.model)
    overflow_at(run, {0, 1, 2, 5})
    seen: list[dict[str, Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(weights(run.model))

    run.add_callback(Keep())
    run.train()
    for name, weight in start.items():
        assert torch.equal(seen[2][name], weight)
        assert torch.equal(seen[5][name], seen[4][name])
    assert any(
        not torch.equal(seen[4][name], start[name]) for name in start
    )  # the first taken step has rate 0
    assert history(run, "skipped_steps") == [3, 1]
    assert history(run, "loss_scale") == [2.0**13, 2.0**12]
    assert history(run, "grad_norm") == []  # the last step before each line overflowed
    assert history(run, "learning_rate") == [0.0, pytest.approx(LR)]  # left-out steps do not count for it
    assert all(map(math.isfinite, history(run, "loss")))
    state = run.optimizer.state[next(run.model.parameters())]
    assert state["step"] == 2


def test_a_model_beyond_the_range_of_float16_stops(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_model("llama"), random_samples(LENGTHS), precision="fp16", epochs=6)
    overflow_at(run, range(100))
    with pytest.raises(ModelError) as caught:
        run.train()
    assert str(caught.value) == (
        "train.precision=fp16: the gradients overflow at every loss scale down to 6.1e-05 (step 30), so the model's "
        "own numbers leave float16's range; use bf16 or fp32"
    )


def test_weights_that_train_are_not_float16(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"^train\.precision=fp16 with model\.embed_tokens\.weight in float16"
    ):
        trainer(tmp_path, tiny_model("llama").half(), random_samples(LENGTHS), precision="fp16")


@pytest.mark.parametrize("log_every", [1, 3])
def test_resume_restores_the_loss_scale(log_every: int, tmp_path: Path) -> None:
    """From every checkpoint, bit by bit: weights, moments, scale and how long it has been the same; and the log."""
    samples = random_samples(LENGTHS)

    def run(output: Path) -> PeftTrainer:
        made = trainer(
            output, tiny_model("llama"), samples, precision="fp16", save_every=1, log_every=log_every
        )
        overflow_at(made, {1, 4})
        return made

    straight = run(tmp_path / "straight")
    straight.train()
    straight.saver.writer.wait()
    for step in range(1, 6):
        checkpoint = tmp_path / "straight" / f"checkpoint-{step}"
        resumed = run(tmp_path / f"from-{step}")
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.accelerator.scaler.state_dict() == straight.accelerator.scaler.state_dict()
        assert logs_of(resumed) == logs_of(straight)
        for name, weight in weights(straight.model).items():
            assert torch.equal(weights(resumed.model)[name], weight), (step, name)
    assert torch.load(checkpoint / "scaler.pt")["scale"] == 2.0**14


# --------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("evaluated", ["fp32", "bf16", "fp16"])
def test_evaluations_have_their_own_arithmetic(precision: str, evaluated: str, tmp_path: Path) -> None:
    """In and after training, the loss is that of the weights under the asked-for autocast alone."""
    samples, held = random_samples(LENGTHS), random_samples([7, 13, 21], seed=5)
    recipe = recipe_of(
        tmp_path,
        data={"eval": ["held"]},
        method={"type": "lora", "rank": 4},
        optim={"lr": 1e-2},
        train={"precision": precision, "eval_precision": evaluated, "max_steps": 2, "eval_every": 1},
    )
    run = trainer_of(recipe, tiny_model("llama"), samples, {"held": held})
    before = run.evaluate()["eval_loss"]
    expected = [plain_loss(run.model, held, evaluated)]
    usual = run.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        expected.append(plain_loss(run.accelerator.unwrap_model(run.model), held, evaluated))
        return usual(*args, **kwargs)

    run.evaluate = evaluate  # type: ignore[method-assign]
    run.train()
    after = run.evaluate()["eval_loss"]
    assert [before, *history(run, "eval_loss")] == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == 3 and expected[-1] == expected[-2]  # the weights moved twice
    others = [plain_loss(run.model, held, name) for name in ("fp32", "bf16", "fp16") if name != evaluated]
    assert all(abs(after / other - 1) > 1e-5 for other in others)


def plain_loss(model: Any, samples: Sequence[Sample], precision: str) -> float:
    """Mean loss from dense logits, one sample at a time, by the forward that accelerate has not wrapped."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    total = weight = 0.0
    training = model.training
    model.eval()
    for sample in samples:
        batch = flat_batch([sample])
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            inner = model.get_base_model()
            hidden = inner.model(
                input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), use_cache=False
            ).last_hidden_state
            logits = inner.lm_head(hidden)[0, :-1].float()
        taken = logits.log_softmax(-1).gather(-1, batch.input_ids[0, 1:, None])[:, 0]
        total -= float((taken * batch.target_weights[:-1]).sum())
        weight += float(batch.target_weights.sum())
    model.train(training)
    return total / weight


# --------------------------------------------------------------------------------------------------
# Clipping


@pytest.mark.parametrize("limit", [0.0, 0.05, 1e9])
def test_clipping_in_closed_form(limit: float, tmp_path: Path) -> None:
    """One SGD step moves by rate * gradient * min(1, limit / (norm + 1e-6)); 0 switches it off; the norm is logged."""
    samples = random_samples([12, 9])
    recipe = recipe_of(
        tmp_path,
        method={"type": "full"},
        optim={"type": "sgd", "lr": 0.5, "max_grad_norm": limit, "schedule": "constant", "warmup": 0},
        train={"rows_per_device": 2, "max_steps": 1},
    )
    run = trainer_of(recipe, tiny_model("llama"), samples)
    start = weights(run.model)
    run.train()
    model: Any = tiny_model("llama", "sdpa")
    weight = sum(float(one.weights[1:].sum()) for one in samples)
    for one in samples:
        ids = torch.from_numpy(one.input_ids.astype(np.int64))[None]
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
        (-(taken * torch.from_numpy(one.weights[1:])).sum() / weight).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
    assert norm > 0.05
    assert history(run, "grad_norm") == pytest.approx([norm], rel=1e-5)
    factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
    expected = {name: start[name] - 0.5 * factor * gradient for name, gradient in gradients.items()}
    assert_same_weights(weights(run.model), expected, start, 1e-4)


# --------------------------------------------------------------------------------------------------
# Kernels


def switches() -> tuple[Any, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


def test_switches_hold_in_the_block_alone() -> None:
    before = switches()
    with kernel_rules(deterministic=False, tf32=None):
        assert switches() == before
    with kernel_rules(deterministic=False, tf32=True):
        assert switches()[:3] == ("high", True, True)
    with kernel_rules(deterministic=False, tf32=False):
        assert switches()[:3] == ("highest", False, False)
    assert switches() == before
    with kernel_rules(deterministic=True, tf32=None):
        assert switches() == (*before[:3], True, False, True)
    assert switches() == before
    with pytest.raises(KeyError), kernel_rules(deterministic=True, tf32=True):
        raise KeyError
    assert switches() == before


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    message = (
        "train.deterministic=true: torch has no deterministic kernel for put_ on this device, and the model needs it; "
        "give train.deterministic=false, or choose another model.attention if that is what calls it"
    )
    with pytest.raises(ModelError) as caught, kernel_rules(deterministic=True, tf32=None):
        torch.zeros(3).put_(torch.tensor([0, 1]), torch.ones(2))
    assert str(caught.value) == message
    with pytest.raises(RuntimeError, match=r"^other$"), kernel_rules(deterministic=True, tf32=None):
        raise RuntimeError("other")


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("tf32", "train.tf32"),
        ("full_determinism", "train.deterministic"),
        ("neftune_noise_alpha", "train.neftune_alpha"),
        ("auto_find_batch_size", "train.fit_memory"),
        ("torch_compile", "train.compile: {backend: ..., mode: ...}"),
        ("fp16_full_eval", "train.eval_precision"),
    ],
)
def test_keys_with_a_place_of_their_own(key: str, instead: str, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, train={"extra": {key: True}})
    with pytest.raises(RecipeError) as caught:
        training_arguments(recipe, use_cpu=True)
    assert str(caught.value) == f"train.extra.{key}: give {instead}"
