"""Random pairs and marked answers, and a tiny policy with a reference that is not far from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.data.encode import EncodeOptions
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.reference import OtherModel
from luthier.types import Batch, LossSum, Sample, Stage
from tests.reference import gradients
from tests.tiny import VOCAB, tiny_model

OPTIONS = EncodeOptions(max_length=64, overflow="drop")


def made_sample(ids: Sequence[Sequence[int]], index: int, label: float = 0.0) -> Sample:
    """A prompt and its answers, whose every token is a target."""
    prompt, *answers = ids
    starts = np.cumsum([len(prompt), *map(len, answers)])[:-1]
    return Sample(
        np.concatenate([np.array(part, np.int32) for part in ids]),
        np.concatenate((np.zeros(len(prompt), np.float32), np.ones(sum(map(len, answers)), np.float32))),
        "made",
        index,
        tuple(starts.tolist()),
        label,
    )


def random_pairs(num: int, seed: int = 1) -> list[Sample]:
    """Pairs of random tokens of unlike lengths; the first answer of the first is of one token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (num, 3))
    lengths[0, 1] = 1
    return [
        made_sample([rng.integers(3, VOCAB, n).tolist() for n in row], index)
        for index, row in enumerate(lengths)
    ]


def random_answers(labels: Sequence[bool], seed: int = 0) -> list[Sample]:
    """Answers of random tokens with these labels, each with the answer of the one before it."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCAB, n).tolist() for n in rng.integers(1, 9, len(labels))]
    answers = [rng.integers(3, VOCAB, n).tolist() for n in rng.integers(1, 9, len(labels))]
    return [
        made_sample([prompts[i], answers[i], answers[i - 1]], i, float(label))
        for i, label in enumerate(labels)
    ]


@dataclass(frozen=True, slots=True)
class Models:
    """A policy and a frozen reference; `plain` are copies without the target forward."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    plain_policy: PreTrainedModel
    plain_reference: PreTrainedModel

    def handle(self) -> ModelPolicy:
        return ModelPolicy(self.policy, reference=OtherModel(self.reference))


def made_models(difference: float = 0.1) -> Models:
    """Models whose weights differ by this part of their size, so that log-ratios are of the size of 1."""
    models = []
    for attention in ("luthier_segments", "eager"):
        policy, reference = tiny_model("llama", attention), tiny_model("llama", attention)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in reference.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * float(parameter.std())
                parameter.add_(difference * noise)
        models += [policy, reference]
    install_target_forward(models[0])
    install_target_forward(models[1])
    return Models(*models)


def step_loss(stage: Stage, policy: ModelPolicy, passes: Sequence[Batch]) -> Tensor:
    """The loss of a step as the trainer computes it; its gradients are added pass by pass."""
    weights: dict[str, Tensor] = {}
    for batch in passes:
        for name, weight in stage.weight(batch).items():
            weights[name] = weights.get(name, torch.zeros(())) + weight
    with torch.no_grad():
        observed = stage.observe(policy, passes)
    total = torch.zeros(())
    for batch in passes:
        loss = divided(stage.loss(policy, batch, observed), weights)
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    return total


def divided(loss_sum: LossSum, weights: dict[str, Tensor]) -> Tensor:
    return torch.stack(
        [term.total / weights[name].clamp(min=1) for name, term in loss_sum.terms.items()]
    ).sum()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by name, which are then taken away."""
    found = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad(set_to_none=True)
    return found
