"""The reward loss is the published one: TRL's, values and gradients, and its closed form."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from trl import RewardTrainer

import luthier.model.attention  # noqa: F401  registers its name
from luthier.data.collate import branch_batch, rows_of
from luthier.data.encode import EncodeOptions
from luthier.model.logprobs import ModelPolicy
from luthier.model.rows import Rows
from luthier.model.value_head import install_score_forward
from luthier.recipe.schema import RmSpec
from luthier.stages import build_stage
from luthier.types import LossSum, Sample
from tests.tiny import FAMILIES, VOCAB

SHAPES = ((6, 5, 3), (1, 4, 8), (9, 2, 2))
"""Tokens of the prompt, of the better and of the worse answer."""


def pairs(labels: tuple[float, ...]) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for index, ((prompt, chosen, rejected), label) in enumerate(zip(SHAPES, labels, strict=True)):
        ids = rng.integers(3, VOCAB, prompt + chosen + rejected).astype(np.int32)
        weights = np.repeat(np.array([0.0, 1.0], np.float32), [prompt, chosen + rejected])
        samples.append(Sample(ids, weights, "made", index, (prompt, prompt + chosen), label))
    return samples


def model_with(attention: str) -> Any:
    config = FAMILIES["llama"]()
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.train()


def ours(samples: list[Sample], spec: RmSpec, model: Any, *, share_prompts: bool) -> LossSum:
    install_score_forward(model, Rows(shares_prompts=share_prompts))
    stage = build_stage(spec, EncodeOptions(64, "drop"), share_prompts=share_prompts)
    batch = stage.collate(samples)
    assert batch.num_tokens == branch_batch(samples, share_prompts=share_prompts).num_tokens
    return stage.loss(ModelPolicy(model), batch, {})


def theirs(samples: list[Sample], model: Any, *, margin: Tensor | None, center: float | None) -> Tensor:
    """The loss of TRL's RewardTrainer on a padded batch, better answers first, as its collator lays it out."""
    rows = [rows_of(sample)[k].input_ids for k in (0, 1) for sample in samples]
    width = max(map(len, rows))
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.from_numpy(row.astype(np.int64)), 1
    inputs = {"input_ids": ids, "attention_mask": mask} | ({} if margin is None else {"margin": margin})
    same = SimpleNamespace(gather=lambda values: values, gather_for_metrics=lambda values: values)
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=same,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss: Tensor = RewardTrainer.compute_loss(trainer, model, inputs)
    model.metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss


@pytest.mark.parametrize("share_prompts", [False, True], ids=["whole", "shared"])
@pytest.mark.parametrize(
    ("labels", "margin", "center"),
    [
        ((math.nan,) * 3, 0.0, 0.0),
        ((math.nan,) * 3, 0.7, 0.0),
        ((0.5, 2.0, 0.0), 0.7, 0.0),
        ((0.5, 2.0, -1.0), 0.0, 0.01),
    ],
    ids=["plain", "recipe-margin", "data-margins", "centred"],
)
def test_loss_gradients_and_metrics_are_those_of_trl(
    labels: tuple[float, ...], margin: float, center: float, share_prompts: bool
) -> None:
    samples, model, plain = pairs(labels), model_with("luthier_segments"), model_with("eager")
    found = ours(samples, RmSpec(margin=margin, center=center), model, share_prompts=share_prompts)
    margins = torch.tensor([margin if math.isnan(label) else label for label in labels])
    expected = theirs(samples, plain, margin=margins if margins.any() else None, center=center or None)
    term = found.terms["loss"]
    assert float(term.weight) == 3
    torch.testing.assert_close(term.total / term.weight, expected, atol=1e-6, rtol=1e-5)
    (term.total / term.weight).backward()
    expected.backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)
    means = {name: float(metric.total / metric.weight) for name, metric in found.metrics.items()}
    assert means["accuracy"] == pytest.approx(plain.metrics["accuracy"])
    assert means["rewards/margins"] == pytest.approx(plain.metrics["margin"], abs=1e-5)
    mean_reward = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
    assert mean_reward == pytest.approx(plain.metrics["mean_reward"], abs=1e-5)


class Says:
    """A policy that gives these scores."""

    def __init__(self, *scores: float) -> None:
        self._scores = torch.tensor(scores)

    def scores(self, batch: Any) -> Tensor:
        return self._scores


def test_closed_form() -> None:
    """Two pairs: better by 2 where the data asks for 0.5, worse by 1 where the recipe's margin 0.25 holds."""
    samples = [*pairs((0.5, math.nan, 0.0))][:2]
    stage = build_stage(RmSpec(margin=0.25, center=0.1), EncodeOptions(64, "drop"))
    batch = stage.collate(samples)
    found = stage.loss(Says(3.0, -1.0, 1.0, 0.0), batch, {})  # type: ignore[arg-type]
    bradley_terry = math.log1p(math.exp(-(2.0 - 0.5))) + math.log1p(math.exp(-(-1.0 - 0.25)))
    assert float(found.terms["loss"].total) == pytest.approx(
        bradley_terry + 0.1 * (4.0**2 + 1.0**2), rel=1e-6
    )
    assert float(found.terms["loss"].weight) == float(stage.weight(batch)["loss"]) == 2
    sums = {name: float(metric.total) for name, metric in found.metrics.items()}
    assert sums == pytest.approx(
        {"accuracy": 1.0, "rewards/chosen": 2.0, "rewards/rejected": 1.0, "rewards/margins": 1.0}
    )


def test_a_tie_is_half_right() -> None:
    stage = build_stage(RmSpec(), EncodeOptions(64, "drop"))
    batch = stage.collate(pairs((math.nan,) * 3))
    found = stage.loss(Says(1.0, 2.0, 0.0, 1.0, 1.0, 5.0), batch, {})  # type: ignore[arg-type]
    assert float(found.metrics["accuracy"].total) == 1.5


def test_the_whole_row_is_scored_what_the_template_writes_after_the_stop_token_too() -> None:
    """A served reward model is given `apply_chat_template`'s tokens: its last token is the one that was trained."""
    from luthier.data.template import load_template
    from luthier.recipe.schema import DataSpec
    from luthier.types import Conversation, Message, Row
    from tests.tiny import chat_tokenizer

    tokenizer = chat_tokenizer()
    template = load_template(tokenizer, DataSpec())
    turns = [[Message("user", "Hi"), Message("assistant", text)] for text in ("good", "bad")]
    row = Row("made", 0, Conversation(tuple(turns[0])), rejected=Conversation(tuple(turns[1])))
    stage = build_stage(RmSpec(), EncodeOptions(64, "drop"))
    (sample,) = stage.encode(row, template).samples
    for messages, branch in zip(turns, rows_of(replace(sample)), strict=True):
        plain = [{"role": message.role, "content": message.content} for message in messages]
        whole = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=True)["input_ids"]
        assert branch.input_ids.tolist() == list(whole)
